"""The pager dies, or the standby, or both: their VMs are served on, and read what they should."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.pager.world import Gate, Host, Vm, kill
from vmd import sandbox
from vmd.errors import Conflict
from vmd.pager import start
from vmd.pager.control import Control, PagerGone
from vmd.states import State, guard

PAGES, REPLAYED = 256, 8192
DEATHS = 20
POLL = "7 "  # of x86-64, as /proc/PID/syscall begins


def adds_up(vm: Vm) -> bool:
    """Whether the counters say what is resident."""
    counters = vm.counters()
    installed = counters.demand + counters.replayed + counters.prefetched + counters.zero - counters.removed
    return installed == len(vm.vmm.resident())


def test_twenty_deaths_in_a_row_while_guests_fault_and_remove(host: Host) -> None:
    reads, removes = host("reads", PAGES).serve(), host("removes", PAGES).serve()
    pids, hit = host.pids(), 0
    for number in range(DEATHS):
        removing = removes.vmm.start("remove_then_verdict", range(PAGES), threads=2, rounds=2, split=True)
        reading = reads.vmm.start("verdict", range(number, PAGES, DEATHS))
        kill(pids.pager)
        hit += removing.results() is None
        assert {verdict for thread in removing.wait() for verdict in thread} == {"zero"}
        assert set(reading.wait()[0]) == {"image"}
        before, pids = pids, host.pids()
        assert (pids.pager, len({*pids, *before})) == (before.standby, 3)
        assert [reads.view().server_pid, removes.view().server_pid] == [pids.pager] * 2
    assert hit > DEATHS / 2
    assert reads.is_whole()
    for vm in (reads, removes):
        eventually(lambda vm=vm: adds_up(vm), f"{vm.counters()} add up")  # type: ignore[misc]
        assert vm.counters().takeovers == DEATHS
    assert host.log() == ["pager died; 2 VMs taken over"] * DEATHS


def test_death_in_the_middle_of_a_replay(host: Host) -> None:
    scattered = sorted(range(REPLAYED), key=lambda page: page * 4099 % REPLAYED)  # no runs: a call for each page
    other = host("other").serve()
    pids = host.pids()
    vm = host("a", REPLAYED, replay=scattered).serve()
    eventually(lambda: vm.counters().replayed > 0, "the replay has begun")
    kill(pids.pager)
    assert not vm.counters().replay_done
    eventually(lambda: vm.counters().replay_done and adds_up(vm), "it is done")
    counters = vm.counters()
    assert (counters.replayed, counters.demand, counters.takeovers) == (REPLAYED, 0, 1)
    assert vm.is_whole()
    assert other.is_whole()


def test_a_standby_that_dies_is_replaced(host: Host) -> None:
    (vm,) = host.serve("a")
    for _ in range(3):
        before = host.pids()
        kill(before.standby)
        pids = eventually(lambda before=before: host.pids() if before.standby not in host.pids() else None, "another")  # type: ignore[misc]
        assert pids.pager == before.pager
    kill(pids.pager)
    assert vm.is_whole()


def test_death_before_the_standby_has_heard_anything(host: Host, gate: Gate) -> None:
    """What was said to it waits in its socket, and nobody hears its answer."""
    (vm,) = host.serve("a")
    gate.reached()
    kill(host.pager())
    gate.open()
    assert vm.is_whole()
    assert "pager died; 1 VMs taken over" in host.log()


def test_death_before_the_standbys_answer_is_heard(host: Host, gate: Gate) -> None:
    (vm,) = host.serve("a")
    gate.reached()
    pager = host.pager()
    os.kill(pager, signal.SIGSTOP)
    gate.open()
    (standby,) = host.processes().keys() - {pager}
    eventually(lambda: Path(f"/proc/{standby}/syscall").read_text().startswith(POLL), "it has answered and waits")
    kill(pager)
    assert vm.is_whole()
    assert "pager died; 1 VMs taken over" in host.log()


@pytest.mark.seed(20)
def test_when_both_die_the_guest_waits_and_the_next_command_recovers(host: Host) -> None:
    vm, other = host.serve("a", "b")
    assert vm.is_whole([0])
    vm.vmm.do("remove", [0])
    box = vm.record(host.settings)
    other.record(host.settings)
    host.kill_both()
    reading = vm.vmm.start("verdict", [0, 1])
    eventually(lambda: vm.vmm.blocked() == 1, "the guest waits")
    assert box.state() is State.FROZEN
    with pytest.raises(Conflict, match="the sandbox is frozen"):
        guard(box.id, box.state(), "exec")

    sandbox.recover(host.settings, pytest.fail)
    assert box.state() is State.RUNNING
    assert reading.wait() == [["zero", "image"]]
    assert vm.is_whole(range(1, 64))
    assert other.is_whole()
    assert sorted(host.log()) == ["a: adopted", "b: adopted"]
    assert vm.counters().takeovers == 1


def test_a_request_in_the_backlog_is_answered_by_the_next(host: Host) -> None:
    host.serve("a")
    pids = host.pids()
    os.kill(pids.pager, signal.SIGSTOP)
    with host.connect() as control:
        asked = threading.Thread(target=lambda: told.append(control.status()))
        told: list[str] = []
        asked.start()
        kill(pids.pager)
        asked.join()
    assert told[0].startswith(f"pager {pids.standby}\n")


def test_a_vm_that_waits_in_the_backlog_is_served_by_the_next(host: Host) -> None:
    host.serve("a")
    vm, pids = host("b"), host.pids()
    os.kill(pids.pager, signal.SIGSTOP)
    handing = threading.Thread(target=vm.serve)
    handing.start()
    kill(pids.pager)
    handing.join()
    assert vm.is_whole()
    assert vm.view().server_pid == pids.standby


def test_who_was_heard_and_not_answered_asks_the_next(host: Host) -> None:
    host.serve("a")
    pids = host.pids()
    asked: list[str] = []

    def ask(control: Control) -> str:
        told = control.status()
        if not asked:
            asked.append(told)
            kill(pids.pager)
            with pytest.raises(PagerGone):
                control.status()
            raise PagerGone
        return told

    assert start.request(host.settings, ask).startswith(f"pager {pids.standby}\n")


def test_a_vm_served_when_both_died_is_served_again_by_who_asks_again(host: Host) -> None:
    """Its creator still holds the journal's lock: nobody can adopt it, and he hands it over again."""
    vm = host("a")
    with host.knock() as peer:
        assert peer.serve("a", vm) == "served"
        host.kill_both()
    assert host.served() == []
    vm.serve()
    assert vm.is_whole()
    assert vm.counters().takeovers == 1
