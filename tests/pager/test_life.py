"""The pager's own life: started when absent, by exactly one, and gone without a trace after its last VM."""

from __future__ import annotations

import random
import socket
import stat
import threading
import time
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.pager.world import Host
from vmd import limits
from vmd.pager import start

IDLE_SECONDS = limits.PAGER_IDLE_SECONDS
RACES, SEED = 100, 7


def left(host: Host) -> list[str]:
    """What is in the run directory."""
    return sorted(path.name for path in host.run_dir.iterdir())


def test_a_vm_is_served_by_a_pager_that_was_not_there(host: Host) -> None:
    assert left(host) == []
    vm = host("a", holes=[5]).serve()
    assert vm.is_whole()
    pids = host.pids()
    assert host.processes() == {pids.pager: "vmd-pager", pids.standby: "vmd-standby"}
    assert host.status()[2:] == [["vm", "a", str(vm.vmm.pid)]]
    assert stat.S_IMODE(host.socket.stat().st_mode) == 0o600
    counters = vm.counters()
    assert (counters.demand, counters.zero, counters.takeovers) == (63, 1, 0)


@pytest.mark.parametrize("idle_seconds", [IDLE_SECONDS])
def test_it_ends_after_its_last_vm_and_leaves_nothing(host: Host) -> None:
    vms = host.serve("a", "b")
    host.pids()
    vms[0].close()
    eventually(lambda: host.served() == ["b"], "a has gone")
    vms[1].close()
    began = time.monotonic()
    for vm in vms:
        for name in ("memory", "pages.sock"):
            (vm.directory / name).unlink(missing_ok=True)
        vm.directory.rmdir()
    eventually(lambda: not host.processes(), "both end")
    assert IDLE_SECONDS / 2 < time.monotonic() - began < 2 * IDLE_SECONDS + 1
    assert left(host) == []


def test_many_that_come_at_once_start_one(host: Host) -> None:
    barrier = threading.Barrier(16)
    told: list[str] = []

    def come() -> None:
        barrier.wait()
        told.append(" ".join(host.status()[0]))

    threads = [threading.Thread(target=come) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 16
    assert len(set(told)) == 1


@pytest.mark.parametrize("idle_seconds", [0.004])
def test_who_comes_at_the_moment_of_its_end_is_served(host: Host) -> None:
    """Pagers end all the time, and requests come a little before, at, and after that moment."""
    pause, pids = random.Random(SEED), set()
    for _ in range(RACES):
        (words,) = host.status()
        pids.add(words[1])
        time.sleep(pause.uniform(0.002, 0.008))
    assert RACES / 10 < len(pids) <= RACES  # some found one, some had to start one


def test_a_socket_that_nobody_listens_to_is_replaced(host: Host) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(host.socket))
        dead.listen()
    (vm,) = host.serve("a")
    assert vm.is_whole([0])


def test_a_file_in_the_place_of_the_socket_is_replaced(host: Host) -> None:
    host.socket.write_text("not a socket")
    assert host.status()[0][0] == "pager"
    assert Path(host.run_dir / start.LOCK).exists()
