"""The image: what is data, what is a hole, and who it is."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.errors import VmdError
from vmd.pages.source import Extents, Image

PAGE = 4096


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "memory"


def write(path: Path, *pages: int, size: int) -> None:
    """A file of ``size`` bytes that holds data in these pages only."""
    with path.open("wb") as file:
        file.truncate(size)
        for page in pages:
            file.seek(page * PAGE)
            file.write(b"\xa5" * PAGE)


@pytest.mark.seed(21)
@pytest.mark.parametrize("kind", ["missing", "directory", "fifo", "socket", "empty", "device"])
def test_what_is_no_memory_file_is_refused_in_one_line(memory: Path, kind: str) -> None:
    says = {
        "missing": "No such file",
        "directory": "a directory",
        "fifo": "a FIFO",
        "socket": "No such device",
        "empty": "is empty",
        "device": "character device",
    }[kind]
    if kind == "directory":
        memory.mkdir()
    elif kind == "fifo":
        os.mkfifo(memory)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(memory))
    elif kind == "empty":
        memory.touch()
    elif kind == "device":
        memory.symlink_to("/dev/null")
    with pytest.raises(VmdError, match=says) as refused:
        Image(memory)
    assert str(memory) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_extents_tell_data_from_holes(memory: Path) -> None:
    write(memory, 3, 4, 9, size=16 * PAGE)
    image = Image(memory)
    extents = Extents(image.data_extents())
    image.close()
    assert [page for page in range(16) if not extents.is_hole(page * PAGE, PAGE)] == [3, 4, 9]
    assert not extents.is_hole(0, 16 * PAGE)


@pytest.mark.parametrize("pages", [[], [0], [15], list(range(16))])
def test_extremes(memory: Path, pages: list[int]) -> None:
    write(memory, *pages, size=16 * PAGE)
    image = Image(memory)
    extents = Extents(image.data_extents())
    image.close()
    assert [page for page in range(16) if not extents.is_hole(page * PAGE, PAGE)] == pages


@given(st.sets(st.integers(0, 63)), st.integers(0, 63), st.integers(1, 20))
def test_lookups_against_a_list_of_bytes(data: set[int], offset: int, size: int) -> None:
    runs = [(at, at + 1) for at in sorted(data)]
    merged: list[tuple[int, int]] = []
    for start, end in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    for extents in (runs, merged):
        assert Extents(extents).is_hole(offset, size) == (not data & set(range(offset, offset + size)))


@pytest.mark.seed(21)
def test_what_a_file_has_lost_is_no_hole(memory: Path) -> None:
    write(memory, 1, size=16 * PAGE)
    image = Image(memory)
    os.truncate(memory, 8 * PAGE)
    extents = Extents(image.data_extents())
    image.close()
    assert [page for page in range(16) if not extents.is_hole(page * PAGE, PAGE)] == [1, *range(8, 16)]


@pytest.mark.seed(54)
@pytest.mark.parametrize("pages", [1, 63, 64, 65, 1000])
def test_identity_is_a_hash_of_sampled_pages(memory: Path, pages: int) -> None:
    content = b"".join(hashlib.sha512(b"%d" % page).digest() * 64 for page in range(pages)) + b"tail"
    memory.write_bytes(content)
    sampled = [i * pages // 64 for i in range(64)] if pages > 64 else range(pages)
    digest = hashlib.sha256(b"".join(content[page * PAGE : page * PAGE + PAGE] for page in sampled)).hexdigest()
    image = Image(memory)
    assert image.identity() == f"{len(content)}:{memory.stat().st_mtime_ns}:{digest}"
    image.close()


@pytest.mark.seed(21, 54)
def test_identity_of_a_torn_file_is_an_error(memory: Path) -> None:
    write(memory, size=16 * PAGE)
    image = Image(memory)
    os.truncate(memory, 2 * PAGE + 5)
    with pytest.raises(VmdError, match="truncated at"):
        image.identity()
    image.close()


def test_one_owner(memory: Path) -> None:
    write(memory, 0, size=PAGE)
    image = Image(memory)
    fd = image.detach()
    image.close()
    image.close()
    os.close(fd)  # still ours
