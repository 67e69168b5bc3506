"""The journal's format, version 1: the stored sample is read, and what is written is what was drawn."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vmd_core

from tests.contract.world import write_image
from tests.crash.conftest import Begin
from tests.crash.sample import PATH, SAMPLE
from tests.fakes.vmm import Span, eventually
from tests.support.journal_file import EVENT_PAGEFAULT, EVENT_REMOVE, INSTALLED, PAGE, REMOVED, JournalFile


def read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return vmd_core.read_journal(file.fileno())


def test_the_sample_is_read() -> None:
    assert read(PATH) == {
        "vmm_pid": 4242, "vmm_start": 123456, "page_size": PAGE, "guest_bytes": 8 * PAGE, "regions": 2,
        "image": b"/images/memory of \xff", "server_pid": 77, "ended": 0, "takeovers": 2, "cpu_us": 1500,
        "incident": "page at 0x7f0000003000 (memory offset 24576) cannot be read",
        "faults": 4, "demand": 2, "replayed": 1, "prefetched": 0, "zero": 0, "removed": 1, "poisoned": 1,
        "present": 0, "parked": 1, "replay_pages": 3, "replay_done": False, "oldest_unserved_us": None,
        "fault_count": 4, "fault_p50_us": 0.656, "fault_p99_us": 8.448, "fault_max_us": 9.0,
    }  # fmt: skip


def test_the_sample_is_the_one_that_its_script_makes() -> None:
    assert PATH.read_bytes() == SAMPLE.pack()
    assert JournalFile.parse(PATH.read_bytes()).pack() == PATH.read_bytes()


@pytest.mark.parametrize("version", [0, 2, 256, (1 << 32) - 1])
def test_other_versions_are_refused(tmp_path: Path, version: int) -> None:
    path = tmp_path / "journal"
    path.write_bytes(replace(SAMPLE, version=version).pack())
    with pytest.raises(ValueError, match=f"^of another version: expected 1, got {version}$"):
        read(path)


@pytest.mark.needs_uffd
def test_what_the_core_writes_is_what_was_drawn(begin: Begin) -> None:
    world = begin()
    plan = world.offsets([3, 9])
    server = world.serve(beside="replay", offsets=plan)
    assert world.vmm.verdicts([1, 5, 6]) == ["zero", "image", "image"]
    assert world.vmm.do("remove", [5]) == ["ok"]
    states = {1: INSTALLED, 3: INSTALLED, 5: REMOVED, 6: INSTALLED, 9: INSTALLED}
    eventually(lambda: {page: state for page, state in enumerate(world.file().states) if state} == states, "noted")
    eventually(lambda: world.left()["replay_done"] and not any(event for event, *_ in world.file().ring), "at rest")
    server.kill()
    data, status = world.journal.read_bytes(), world.memory.path.stat()
    file = JournalFile.parse(data)
    assert file.pack()[:2048] == data[:2048]  # then the ring: what is left of a message that was applied
    assert file.pack()[4096:] == data[4096:]
    assert (file.vmm_pid, file.page_size, file.path) == (world.vmm.pid, PAGE, os.fsencode(world.memory.path))
    assert (file.device, file.inode, file.image_bytes) == (status.st_dev, status.st_ino, status.st_size)
    assert file.mtime_ns == status.st_mtime_ns
    assert sorted(file.regions) == [(one.base, one.size, one.offset) for one in world.vmm.regions.ordered]
    assert (file.offsets, file.live["server_pid"]) == (plan, server.pid)


@pytest.mark.needs_uffd
def test_another_goes_on_from_the_sample(begin: Begin, tmp_path: Path) -> None:
    """A VM is brought to what the sample says of it, and adopted."""
    image = write_image(tmp_path / "memory", 8, (), PAGE)
    world = begin([Span(5, 3), Span(3, 0)], image)
    server = world.serve()
    assert world.vmm.verdicts([0, 1, 4, 6]) == ["image"] * 4
    assert world.vmm.do("remove", [1]) == ["ok"]
    server.kill()
    low, high = world.vmm.regions.ordered
    sample, found = (JournalFile.parse(path.read_bytes()) for path in (PATH, world.journal))
    same = ("boot_id", "vmm_pid", "vmm_start", "device", "inode", "image_bytes", "mtime_ns", "path", "regions")
    ring = [(EVENT_PAGEFAULT, 0, low.base + 2 * PAGE), (EVENT_REMOVE, high.base, high.base + PAGE)]
    world.journal.write_bytes(replace(sample, **{name: getattr(found, name) for name in same}, ring=ring).pack())

    served = world.adopt()
    counters = served.replayed()
    assert world.vmm.resident() == {0, 2, 4, 6}  # of the plan 6 was in, 5 is not filled: it was removed
    assert (counters.demand, counters.replayed, counters.zero, counters.removed) == (2, 3, 0, 1)
    assert (counters.takeovers, counters.faults, counters.poisoned, counters.fault_count) == (3, 4, 1, 4)
    assert world.vmm.verdicts([0, 1, 2, 4, 5, 6, 7]) == ["image", "zero", "image", "image", "zero", "image", "image"]
    served.finish()
