"""A VM that a page server crashes on takes no other VM with it."""

from __future__ import annotations

import os
import signal

import pytest

from tests.fakes.vmm import eventually
from tests.pager.world import Host, Vm, crash, kill


@pytest.fixture
def three(host: Host) -> list[Vm]:
    vms = host.serve("a", "bad", "c")
    host.pids()
    return vms


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT])
def test_after_the_second_crash_the_vm_is_given_up_and_the_others_go_on(
    host: Host, three: list[Vm], number: int
) -> None:
    a, bad, c = three
    record = bad.record(host.settings)
    crash(host.pids().pager, "bad", number)
    assert all(vm.is_whole([0]) for vm in three)
    assert bad.vmm.is_alive()

    crash(host.pids().pager, "bad", number)
    assert bad.vmm.wait() == -signal.SIGKILL
    why = "2 page servers have crashed on it"
    host.says(f"^bad: killed: {why}$")
    assert (bad.view().ended, bad.view().incident) == ("failed", why)
    stats = record.stats()
    assert stats is not None
    assert (stats["state"], stats["incident"], stats["takeovers"]) == ("ended", why, 1)
    assert a.is_whole()
    assert c.is_whole()
    assert host.served() == ["a", "c"]
    assert [vm.counters().takeovers for vm in (a, c)] == [2, 2]
    assert host.log().count(f"bad: killed: {why}") == 1


def test_crashes_on_different_vms_do_not_add_up(host: Host, three: list[Vm]) -> None:
    for vm in three:
        crash(host.pids().pager, vm.name)
    assert all(vm.is_whole() for vm in three)
    assert host.served() == ["a", "bad", "c"]


def test_a_crash_of_the_pager_itself_counts_for_nobody(host: Host, three: list[Vm]) -> None:
    for _ in range(3):
        crash(host.pids().pager, "vmd-pager")
    assert all(vm.is_whole() for vm in three)


def test_kills_count_for_nobody(host: Host, three: list[Vm]) -> None:
    for _ in range(4):
        kill(host.pids().pager)
    assert all(vm.is_whole() for vm in three)


def test_crashes_count_when_both_died_too(host: Host, three: list[Vm]) -> None:
    """The standby is there no more when it crashes for the second time."""
    a, bad, c = three
    crash(host.pids().pager, "bad")
    pids = host.pids()
    os.kill(pids.standby, signal.SIGSTOP)
    crash(pids.pager, "bad")
    kill(pids.standby)
    eventually(lambda: host.served() == ["a", "c"], "the others are adopted")
    assert bad.vmm.wait() == -signal.SIGKILL
    assert bad.view().incident == "2 page servers have crashed on it"
    assert a.is_whole()
    assert c.is_whole()
