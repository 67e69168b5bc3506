"""Pager and standby died, and not every VM can be adopted: those are killed with a reason, the others are served on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.pager.world import Host, Vm, kill
from tests.system.conftest import Cli
from vmd import sandbox
from vmd.pager import look
from vmd.states import State

PR_CAPBSET_DROP, CAP_SYS_PTRACE = 24, 19


def inspect(vm: Vm) -> dict[str, object]:
    """What `vmd inspect` says of its pages."""
    content = Cli().json("inspect", vm.name)["pages"]
    assert isinstance(content, dict)
    return content


def recover_without(bad: Vm, host: Host) -> None:
    """Recover; whoever does is warned of the one that is lost."""
    warnings: list[str] = []
    sandbox.recover(host.settings, warnings.append)
    assert warnings == [lost(bad, host)]


def lost(bad: Vm, host: Host) -> str:
    return f"sandbox {bad.name}: nobody can serve its pages: its VMM is killed; see {host.run_dir}/pager.log"


@pytest.fixture
def two(host: Host) -> tuple[Vm, Vm]:
    """Two recorded sandboxes, served; a page of each is in."""
    vms = host.serve("bad", "good")
    for vm in vms:
        vm.record(host.settings)
        assert vm.is_whole([0])
    return vms[0], vms[1]


def test_an_image_that_was_changed(host: Host, two: tuple[Vm, Vm]) -> None:
    bad, good = two
    host.kill_both()
    os.utime(bad.memory.path)
    recover_without(bad, host)
    assert bad.vmm.wait() == -signal.SIGKILL
    why = f"memory {bad.memory.path}: not the image of the journal: another file, or changed since"
    assert f"bad: killed: {why}" in host.log()
    assert bad.view().ended == "failed"
    assert str(bad.view().incident).endswith(why)
    assert good.is_whole()
    told = inspect(bad)
    assert (told["state"], str(told["incident"]).endswith(why)) == ("ended", True)
    assert inspect(good)["incident"] is None
    assert sandbox.find(host.settings, "bad").state() is State.DEAD


def test_an_image_that_has_gone(host: Host, two: tuple[Vm, Vm]) -> None:
    bad, good = two
    host.kill_both()
    bad.memory.path.unlink()
    recover_without(bad, host)
    assert bad.vmm.wait() == -signal.SIGKILL
    assert str(bad.view().incident).endswith(f"memory {bad.memory.path}: No such file or directory")
    assert good.is_whole()


def test_a_journal_that_is_damaged(host: Host, two: tuple[Vm, Vm]) -> None:
    """Nobody knows which VMM it is of but the record; its VM would wait for ever."""
    bad, good = two
    host.kill_both()
    with bad.journal.path.open("r+b") as file:
        file.seek(60)
        file.write(b"\xff" * 8)
    recover_without(bad, host)
    assert bad.vmm.wait() == -signal.SIGKILL
    assert any(line.startswith("bad: passed by: ") and "corrupt: its checksum" in line for line in host.log())
    assert good.is_whole()


def test_a_journal_that_has_gone(host: Host, two: tuple[Vm, Vm]) -> None:
    bad, good = two
    host.kill_both()
    bad.journal.path.unlink()
    recover_without(bad, host)
    assert bad.vmm.wait() == -signal.SIGKILL
    assert good.is_whole()


def test_an_image_that_changed_while_it_was_served(host: Host, two: tuple[Vm, Vm]) -> None:
    """Its pager has it open and serves on. No standby that comes later takes it, and the log says so in time."""
    bad, good = two
    os.utime(bad.memory.path)
    before = host.pids()
    kill(before.standby)
    host.says("^standby: bad: the fourth descriptor is not the image of the journal$")
    assert bad.is_whole(range(8))
    kill(host.pids().pager)
    assert bad.vmm.wait() == -signal.SIGKILL
    eventually(lambda: "not the image of the journal" in (bad.view().incident or ""), "the journal says why")
    assert good.is_whole()


def test_no_permission_to_its_userfaultfd(host: Host, run_dir: Path) -> None:
    """Adoption needs what a debugger needs: the one pager that could is not allowed to."""
    (vm,) = host.serve("bad")
    box = vm.record(host.settings)
    host.kill_both()
    script = (
        f"import ctypes; assert ctypes.CDLL(None).prctl({PR_CAPBSET_DROP}, {CAP_SYS_PTRACE}) == 0\n"
        "from vmd import sandbox; from vmd.settings import Settings; sandbox.recover(Settings.read(), print)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (lost(vm, host) + "\n", "")
    assert vm.vmm.wait() == -signal.SIGKILL
    why = rf"vmm {vm.vmm.pid}: its userfaultfd: Permission denied \(ptrace permission is needed\)$"
    host.says(f"^bad: killed: .*{why}")
    assert re.search(why, vm.view().incident or "")
    assert box.state() is State.DEAD


def test_a_vmm_that_died_meanwhile(host: Host, two: tuple[Vm, Vm]) -> None:
    bad, good = two
    host.kill_both()
    bad.vmm.close()
    sandbox.recover(host.settings, pytest.fail)
    assert good.is_whole()
    assert host.served() == ["good"]


@contextmanager
def looking(vm: Vm) -> Iterator[None]:
    """Somebody looks all the time whether it is served."""
    stop = threading.Event()

    def look_() -> None:
        while not stop.is_set():
            look.is_served(vm.journal.path)

    threads = [threading.Thread(target=look_) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_who_looks_whether_it_is_served_is_not_taken_for_its_server(host: Host, two: tuple[Vm, Vm]) -> None:
    bad, _ = two
    for _ in range(5):
        host.kill_both()
        with looking(bad):
            eventually(lambda: not bad.is_served(), "it is let go")
            sandbox.recover(host.settings, pytest.fail)
        assert bad.vmm.is_alive()
        assert host.served() == ["bad", "good"]
