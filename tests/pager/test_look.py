"""What is said of a VM that the pager serves, to whom, and that looking at it disturbs nobody."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.pager.world import Host, kill
from tests.system.conftest import Cli
from vmd.pages.contract import Counters
from vmd.pages.journal import Journal
from vmd.pages.source import Image
from vmd.pages.stats import ServedVm, report

KEYS = report("native", "serving", ServedVm(1, 4096, 0, 1), Counters()).keys() | {"takeovers", "incident"}


def test_stats_have_the_keys_of_any_page_server_and_two_more(host: Host) -> None:
    vm = host("a", holes=[5], replay=[1, 2, 5]).serve()
    box = vm.record(host.settings)
    eventually(lambda: vm.counters().replay_done, "the replay is done")
    assert vm.vmm.verdicts([0, 1]) == ["image", "image"]
    vm.vmm.do("remove", [1])
    kill(host.pids().pager)
    assert vm.vmm.verdicts([1]) == ["zero"]
    stats = box.stats()
    assert stats is not None
    assert stats.keys() == KEYS
    wanted = {
        "core": "native", "state": "serving", "vmm_pid": vm.vmm.pid, "page_size": 4096, "guest_bytes": 64 * 4096,
        "regions": 1, "demand": 1, "replayed": 2, "prefetched": 0, "zero": 2, "removed": 1, "poisoned": 0,
        "bytes": 5 * 4096, "takeovers": 1, "incident": None,
    }  # fmt: skip
    assert {key: stats[key] for key in wanted} == wanted
    assert stats["replay"] == {"pages": 3, "skipped": 0, "done": True, "refused": None}
    assert stats["cpu_us"] > 0
    assert Cli().json("inspect", "a")["pages"].keys() == KEYS


def test_cpu_time_goes_on_over_takeovers_and_is_up_to_date(host: Host) -> None:
    vm = host("a", pages=256).serve()
    box, used = vm.record(host.settings), [0]
    for _ in range(3):
        vm.vmm.do("remove_then_verdict", range(256))
        used.append((box.stats() or {})["cpu_us"])
        kill(host.pids().pager)
    assert used == sorted(set(used))


def test_who_serves_is_the_pages_pid(host: Host) -> None:
    (vm,) = host.serve("a")
    box, pids = vm.record(host.settings), host.pids()
    assert vm.is_whole([0])
    assert box.describe()["pages_pid"] == pids.pager
    kill(pids.pager)
    assert vm.is_whole([1])
    assert box.describe()["pages_pid"] == pids.standby


def test_stats_do_not_need_a_pager_that_answers(host: Host) -> None:
    (vm,) = host.serve("a")
    box = vm.record(host.settings)
    assert vm.is_whole()
    with host.hung():
        assert (box.stats() or {})["demand"] == 64


def test_a_page_that_cannot_be_read_is_named(host: Host) -> None:
    """It is poisoned: whoever touches it hears of it. The other pages are served on."""
    (vm,) = host.serve("a")
    vm.record(host.settings)
    host.pids()
    os.truncate(vm.memory.path, 32 * 4096)
    assert vm.vmm.do("kernel_read", [40]) == ["EFAULT"]
    assert vm.is_whole(range(32))
    address = vm.vmm.regions.address(40)
    why = f"page at {address:#x} (memory offset {40 * 4096}) cannot be read: failed to fill whole buffer"
    assert host.log() == [f"a: {why}"]
    stats = Cli().json("inspect", "a")["pages"]
    assert (stats["poisoned"], stats["incident"], stats["state"]) == (1, why, "serving")


def test_many_pages_that_cannot_be_read_are_named_up_to_a_bound(host: Host) -> None:
    (vm,) = host.serve("a")
    host.pids()
    os.truncate(vm.memory.path, 32 * 4096)
    assert set(vm.vmm.do("kernel_read", range(32, 64))) == {"EFAULT"}
    assert len(host.log()) == 10
    vm.close()
    host.says("^a: 22 more pages could not be read$")


def test_who_looks_does_not_disturb_who_makes_a_journal(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vmd ls` in one shell, `vmd create` in another: for an instant the looker has the lock."""
    image = tmp_path / "memory"
    image.write_bytes(b"x" * 4096)
    made, real = run_dir / "journal", os.fstat
    timers: list[threading.Timer] = []

    def look_now(fd: int) -> os.stat_result:
        """In the moment between the file's birth and its lock."""
        if made.exists() and not timers:
            looker = os.open(made, os.O_RDONLY)
            fcntl.flock(looker, fcntl.LOCK_SH)
            timers.append(threading.Timer(0.05, os.close, [looker]))
            timers[0].start()
        return real(fd)

    monkeypatch.setattr(os, "fstat", look_now)
    source = Image(image)
    kept = Journal.create(made, source, "native")
    timers[0].join()
    kept.remove()
    kept.close()
    source.close()
