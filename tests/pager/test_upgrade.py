"""The pager is replaced on purpose: everything is handed over, and at no moment are there two who read."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from tests.fakes.vmm import eventually
from tests.pager.world import Gate, Host, Vm, kill
from vmd.errors import PagesFailed
from vmd.pager.control import Control
from vmd.vmm import process

UPGRADES, PAGES = 20, 256


def upgrade(host: Host) -> None:
    with host.connect() as control:
        control.upgrade()


class Readers:
    """Watches who serves a VM: when another has begun, the one before must be dead."""

    def __init__(self, vm: Vm, pager: int) -> None:
        self.seen = [pager]
        self.together: list[tuple[int, int]] = []
        self._vm = vm
        self._pidfd = os.pidfd_open(self.seen[0])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Readers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        os.close(self._pidfd)

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            if (pid := self._vm.view().server_pid) != self.seen[-1]:
                if not process.is_dead(self._pidfd):
                    self.together.append((self.seen[-1], pid))
                self.seen.append(pid)
                os.close(self._pidfd)
                self._pidfd = os.pidfd_open(pid)


def test_many_upgrades_under_load_lose_no_fault_and_never_two_read(host: Host) -> None:
    reads, removes = host("reads", PAGES).serve(), host("removes", PAGES).serve()
    pids, hit = host.pids(), 0
    with Readers(removes, pids.pager) as readers:
        for number in range(UPGRADES):
            removing = removes.vmm.start("remove_then_verdict", range(PAGES), threads=2, rounds=4, split=True)
            reading = reads.vmm.start("verdict", range(number, PAGES, UPGRADES))
            upgrade(host)
            hit += removing.results() is None
            assert {verdict for thread in removing.wait() for verdict in thread} == {"zero"}
            assert set(reading.wait()[0]) == {"image"}
            pids = host.pids(other_than=pids.pager)
        assert readers.together == []
        assert len(readers.seen) == UPGRADES + 1
    assert hit > UPGRADES / 2
    assert reads.is_whole()
    assert [vm.counters().takeovers for vm in (reads, removes)] == [UPGRADES] * 2
    assert [line for line in host.log() if line != "handed over"] == ["pager died; 2 VMs taken over"] * UPGRADES


def test_sigterm_hands_over(host: Host) -> None:
    (vm,) = host.serve("a")
    before = host.pids()
    with Readers(vm, before.pager) as readers:
        kill(before.pager, signal.SIGTERM)
        assert vm.is_whole()
        assert host.pids().pager == before.standby
    assert readers.together == []
    assert host.log() == ["handed over", "pager died; 1 VMs taken over"]


def test_sigterm_of_the_standby_brings_another(host: Host) -> None:
    (vm,) = host.serve("a")
    before = host.pids()
    kill(before.standby, signal.SIGTERM)
    pids = eventually(lambda: host.pids() if host.processes().keys() - {*before} else None, "another")
    assert pids.pager == before.pager
    assert vm.is_whole()


def test_sigterm_without_a_vm_ends_it(host: Host) -> None:
    with host.knock():
        (pager,) = host.processes()
        os.kill(pager, signal.SIGTERM)
    eventually(lambda: not host.processes(), "it ends")


def test_sigterm_waits_for_a_standby_and_burns_nothing(host: Host, gate: Gate) -> None:
    (vm,) = host.serve("a")
    gate.reached()
    pager = host.pager()
    os.kill(pager, signal.SIGTERM)
    began, used = time.monotonic_ns(), main_thread_ns(pager)
    assert set(vm.vmm.do("remove_then_verdict", range(64), rounds=30)) == {"zero"}
    assert main_thread_ns(pager) - used < (time.monotonic_ns() - began) / 4
    gate.open()
    eventually(lambda: vm.view().server_pid != pager, "it is handed over")
    assert set(vm.vmm.verdicts()) == {"zero"}


def main_thread_ns(pid: int) -> int:
    """CPU time of the thread that listens."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0])


class Asking:
    """Somebody who asks for an upgrade and waits for the answer."""

    def __init__(self, host: Host) -> None:
        self._told: list[str] = []
        self._thread = threading.Thread(target=self._ask, args=[host.connect()])
        self._thread.start()

    def _ask(self, control: Control) -> None:
        with control:
            try:
                control.upgrade()
                self._told.append("done")
            except PagesFailed as refused:
                self._told.append(str(refused))

    def told(self) -> str:
        self._thread.join()
        return self._told[0]


def test_an_upgrade_whose_new_pager_dies_is_refused_and_changes_nothing(host: Host, gate: Gate) -> None:
    (vm,) = host.serve("a")
    gate.reached()
    gate.open()
    before = host.pids()
    first = Asking(host)
    gate.reached()
    assert vm.is_whole(range(8))
    gate.open(b"die")
    assert first.told() == "pager: the new standby has died; nothing has changed"

    gate.reached()  # one that nobody asked for follows
    gate.open()
    assert host.pids().pager == before.pager
    assert vm.is_whole(range(16))
    assert (vm.view().server_pid, vm.counters().takeovers) == (before.pager, 0)

    second = Asking(host)
    gate.reached()
    gate.open()
    assert second.told() == "done"
    eventually(lambda: vm.counters().takeovers == 1, "it is handed over")
    assert vm.is_whole()


def test_one_upgrade_at_a_time(host: Host, gate: Gate) -> None:
    (vm,) = host.serve("a")
    gate.reached()
    gate.open()
    host.pids()
    first = Asking(host)
    gate.reached()
    assert Asking(host).told() == "pager: an upgrade is under way"
    gate.open()
    assert first.told() == "done"
    assert vm.is_whole()
    assert vm.counters().takeovers == 1


def test_what_is_served_while_the_new_one_starts_is_handed_over_too(host: Host, gate: Gate) -> None:
    (first,) = host.serve("a")
    gate.reached()
    gate.open()
    host.pids()
    asking = Asking(host)
    gate.reached()
    (second,) = host.serve("b")
    first.close()
    gate.open()
    assert asking.told() == "done"
    eventually(lambda: second.counters().takeovers == 1, "it is handed over")
    assert second.is_whole()
    assert host.served() == ["b"]
    assert host.log() == ["handed over", "pager died; 1 VMs taken over"]
