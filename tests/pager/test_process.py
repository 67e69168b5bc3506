"""What makes the pager's process fit for its work, and what becomes of those who wait for one that hangs."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.pager.world import HUNG_SECONDS, Host
from vmd import limits, sandbox
from vmd.errors import TimedOut
from vmd.pager import start
from vmd.states import State

DESCRIPTORS_MAX = 1 << 16


def may_be_spared() -> bool:
    """Whether this host lets root do it: a container may not."""
    return (
        subprocess.run(["sh", "-c", "echo -999 > /proc/self/oom_score_adj"], stderr=subprocess.DEVNULL).returncode == 0
    )


def test_its_memory_stays_and_its_descriptors_suffice(host: Host) -> None:
    host.serve("a")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for pid in host.pids():
        proc = Path("/proc", str(pid))
        status = proc.joinpath("status").read_text()
        locked, resident = (int(re.findall(rf"{key}:\s+(\d+) kB", status)[0]) for key in ("VmLck", "VmRSS"))
        assert locked > 0.9 * resident > 1000
        assert proc.joinpath("oom_score_adj").read_text().strip() == ("-999" if may_be_spared() else "0")
        files = re.findall(r"Max open files\s+(\d+)", proc.joinpath("limits").read_text())
        assert int(files[0]) == min(hard, DESCRIPTORS_MAX)
        assert proc.joinpath("cwd").readlink() == Path("/")
        assert os.getsid(pid) != os.getsid(0)


def test_one_that_hangs_fails_who_asks_within_his_bound(host: Host) -> None:
    (other,) = host.serve("other")
    vm = host("a")
    with host.hung():
        began = time.monotonic()
        with pytest.raises(TimedOut, match=rf"^pager: no answer within {HUNG_SECONDS} s$"):
            vm.serve()
        assert time.monotonic() - began < 10 * HUNG_SECONDS
    assert other.is_whole()


def fill_backlog(host: Host, stack: ExitStack) -> None:
    while True:
        peer = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        peer.setblocking(False)
        peer.connect(str(host.socket))


def test_one_that_hangs_behind_a_full_backlog_is_not_replaced(host: Host) -> None:
    """Somebody listens there: a second pager beside it would take its socket away."""
    (vm,) = host.serve("a")
    pids = host.pids()
    with host.hung(), ExitStack() as stack:
        with pytest.raises(BlockingIOError):
            fill_backlog(host, stack)
        with pytest.raises(TimedOut, match=rf"^pager: no place in its backlog within {HUNG_SECONDS} s$"):
            host.status()
    assert host.pids() == pids
    assert host.processes().keys() == {*pids}
    assert vm.is_whole()


def test_commands_go_on_when_no_pager_can_be_had(host: Host) -> None:
    """A VM that nobody serves is told of, and left for who can."""
    (vm,) = host.serve("a")
    box = vm.record(host.settings)
    host.kill_both()
    lock = os.open(host.run_dir / start.LOCK, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)  # somebody who starts one and does not get on
    warnings: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "STORE_LOCK_SECONDS", HUNG_SECONDS)
        sandbox.recover(host.settings, warnings.append)
    os.close(lock)
    assert [line.partition(": lock ")[0] for line in warnings] == ["sandboxes that nobody serves"]
    assert box.state() is State.FROZEN
    sandbox.recover(host.settings, pytest.fail)
    assert vm.is_whole()
