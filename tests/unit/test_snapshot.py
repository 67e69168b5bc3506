"""What a snapshot says of itself, what is refused, and how zeros leave its memory."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from vmd import snapshot as snapshots
from vmd.errors import SnapshotError
from vmd.pages.source import Image
from vmd.snapshot import Snapshot, compact, snapshot_format

PAGE = 4096


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    vmstate, memory = os.urandom(100), os.urandom(3 * PAGE)
    (tmp_path / "vmstate").write_bytes(vmstate)
    (tmp_path / "memory").write_bytes(memory)
    return Snapshot(
        directory=tmp_path, snapshot_id="0" * 32, page_size=PAGE, firecracker="1.12.1", format="6.0.0",
        vmstate_bytes=len(vmstate), memory_bytes=len(memory),
        vmstate_sha256=hashlib.sha256(vmstate).hexdigest(), memory_sha256=hashlib.sha256(memory).hexdigest(),
    )  # fmt: skip


def test_saved_and_loaded(snapshot: Snapshot) -> None:
    assert snapshots.load(snapshot.directory, snapshot.save()) == snapshot
    assert snapshots.load(snapshot.directory, {**snapshot.save(), "later": 1}) == snapshot
    snapshot.check()
    snapshot.verify()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "schema 2, this vmd reads 1"),
        ({"schema": None}, "schema None, this vmd reads 1"),
        ({"page_size": 8192}, "page size 8192 is unknown"),
    ],
)
def test_another_version_is_refused_with_a_word(snapshot: Snapshot, change: dict[str, object], words: str) -> None:
    with pytest.raises(SnapshotError, match=words):
        snapshots.load(snapshot.directory, {**snapshot.save(), **change})


def test_a_manifest_without_it_is_refused(snapshot: Snapshot) -> None:
    nones: tuple[object, ...] = (None, [], "x")
    for none in nones:
        with pytest.raises(SnapshotError, match="the manifest does not describe it"):
            snapshots.load(snapshot.directory, none)
    saved = snapshot.save()
    del saved["snapshot_id"], saved["format"]
    with pytest.raises(SnapshotError, match="the manifest lacks snapshot_id, format"):
        snapshots.load(snapshot.directory, saved)


@pytest.mark.parametrize("name", ["vmstate", "memory"])
@pytest.mark.parametrize("change", ["empty", "shorter", "longer", "missing"])
def test_torn_files_are_told_by_their_size(snapshot: Snapshot, name: str, change: str) -> None:
    path = snapshot.directory / name
    content = path.read_bytes()
    path.unlink()
    if change != "missing":
        path.write_bytes({"empty": b"", "shorter": content[:-1], "longer": content + b"x"}[change])
    with pytest.raises(SnapshotError, match=rf"^torn snapshot: .*/{name}.*: do not retry$"):
        snapshot.check()


@pytest.mark.parametrize("name", ["vmstate", "memory"])
def test_a_changed_byte_is_told_by_the_digests_only(snapshot: Snapshot, name: str) -> None:
    path = snapshot.directory / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    snapshot.check()
    with pytest.raises(SnapshotError, match=rf"{name} is not what was frozen"):
        snapshot.verify()


@pytest.mark.parametrize("seed", range(20))
def test_compacting_changes_no_byte(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    content = b"".join(
        draw.choice((bytes(PAGE), draw.randbytes(PAGE))) * draw.choice((1, 3, 20, 1500))
        for _ in range(draw.randrange(1, 12))
    ) + draw.randbytes(draw.choice((0, 100)))  # fmt: skip
    memory = tmp_path / "memory"
    memory.write_bytes(content)
    assert compact(memory) == hashlib.sha256(content).hexdigest()
    assert memory.read_bytes() == content


def test_long_runs_of_zeros_become_holes_and_short_ones_stay(tmp_path: Path) -> None:
    data = b"\xff" * PAGE
    runs = [(1 << 20, True), (15 * PAGE, False), (16 * PAGE, True), (9 << 20, True), (PAGE, False)]
    memory = tmp_path / "memory"
    memory.write_bytes(b"".join(data + bytes(size) for size, _ in runs) + data)
    compact(memory)
    image = Image(memory)
    extents = image.data_extents()
    image.close()
    holes = [after[0] - before[1] for before, after in pairwise(extents)]
    assert holes == [size for size, hole in runs if hole]


def test_holes_at_both_ends(tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(5 << 20) + b"\xff" * PAGE + bytes(5 << 20))
    compact(memory)
    assert memory.stat().st_size == (10 << 20) + PAGE
    assert memory.stat().st_blocks * 512 <= 2 * PAGE


def test_the_format_is_asked_of_the_binary_and_remembered(tmp_path: Path, snapshot: Snapshot) -> None:
    binary, asked = tmp_path / "firecracker", tmp_path / "asked"
    binary.write_text(f"#!/bin/sh\necho x >> {asked}\necho v9.0.0\necho\necho exiting\n")
    binary.chmod(0o755)
    assert [asyncio.run(snapshot_format(binary)) for _ in range(3)] == ["9.0.0"] * 3
    assert asked.read_text() == "x\n"
    with pytest.raises(SnapshotError, match=r"^snapshot format 6\.0\.0, of Firecracker 1\.12\.1: .* loads 9\.0\.0"):
        asyncio.run(snapshot.require_format(binary))
    asyncio.run(replace(snapshot, format="9.0.0").require_format(binary))
    binary.write_text("#!/bin/sh\necho nonsense\n")
    with pytest.raises(SnapshotError, match="no version in b'nonsense"):
        asyncio.run(snapshot_format(binary))
    with pytest.raises(SnapshotError, match="No such file"):
        asyncio.run(snapshot_format(tmp_path / "nothing"))


def test_a_binary_that_does_not_answer_holds_nobody_up(tmp_path: Path) -> None:
    binary, go = tmp_path / "firecracker", tmp_path / "go"
    binary.write_text(f"#!/bin/sh\nwhile [ ! -e {go} ]; do sleep 0.01; done\necho v9.0.0\n")
    binary.chmod(0o755)

    async def story() -> str:
        asking = asyncio.create_task(snapshot_format(binary))
        await asyncio.sleep(0.05)
        assert not asking.done()
        go.touch()  # by the loop that asks: it is free
        return await asking

    assert asyncio.run(story()) == "9.0.0"
