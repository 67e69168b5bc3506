"""The VMM as a process: who it is, whose end it shares."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.vmm.conftest import run
from vmd.errors import NotFound, VmmError
from vmd.settings import Settings
from vmd.vmm import process
from vmd.vmm.vmm import Vmm

SPAWN_AND_WAIT = """
import asyncio, sys
from pathlib import Path
from vmd.vmm.vmm import Vmm

async def main():
    vmm = await Vmm.spawn(sys.argv[1], Path(sys.argv[2]), "t1", dies_with_parent=sys.argv[3] == "bound")
    print(vmm.pid, vmm.start_time, flush=True)
    await vmm.exited()

asyncio.run(main())
"""


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "free"])
def test_dies_with_its_parent_when_asked_to(firecracker: str, vm_dir: Path, bound: bool) -> None:
    word = "bound" if bound else "free"
    with subprocess.Popen(
        [sys.executable, "-c", SPAWN_AND_WAIT, firecracker, vm_dir, word], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        pid, started = map(int, parent.stdout.readline().split())
        pidfd = process.find(pid, started)
        assert pidfd is not None
        parent.kill()
    deadline = time.monotonic() + (5 if bound else 0.3)
    while not process.is_dead(pidfd) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.is_dead(pidfd) == bound
    run(process.kill(pidfd))
    os.close(pidfd)


def test_a_parent_that_died_too_early_is_noticed(
    firecracker: str, vm_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # the child then sees another parent than the one that asked
    with pytest.raises(VmmError, match="the VMM has exited"):
        run(Vmm.spawn(firecracker, vm_dir, "t1", dies_with_parent=True))


def test_start_time_survives_a_hostile_name(tmp_path: Path) -> None:
    hostile = tmp_path / ") S 1 (x"
    hostile.symlink_to("/bin/sleep")
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    with subprocess.Popen([hostile, "100"]) as child:
        try:
            started = process.start_time(child.pid) / os.sysconf("SC_CLK_TCK")
        finally:
            child.kill()
    assert before - 0.1 < started < before + 10


def test_only_the_same_process_is_found() -> None:
    with subprocess.Popen(["sleep", "100"]) as child:
        started = process.start_time(child.pid)
        assert process.find(child.pid, started - 1) is None
        pidfd = process.find(child.pid, started)
        assert pidfd is not None
        child.kill()
        run(process.exited(pidfd))
        # A zombie keeps pid and start time, and is dead all the same.
        assert process.start_time(child.pid) == started
        assert process.find(child.pid, started) is None
        os.close(pidfd)
    assert process.find(child.pid, started) is None
    assert process.find(2**22 + 1, 0) is None


def test_kill_reaps_children_and_leaves_others_to_their_parents() -> None:
    child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "100")
    pidfd = os.pidfd_open(child)
    run(process.kill(pidfd))
    run(process.kill(pidfd))
    os.close(pidfd)
    with pytest.raises(ChildProcessError):
        os.waitpid(child, 0)


def test_firecracker_is_found_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(**env: str) -> str:
        return process.find_firecracker(Settings.read(env))

    def binary(directory: Path) -> Path:
        path = directory / "firecracker"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
        return path

    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    with pytest.raises(NotFound, match="firecracker: not found") as missing:
        find()
    assert missing.value.hint == "run `make develop`, or set VMD_FIRECRACKER to the binary"
    on_path = binary(tmp_path / "path")
    assert find() == str(on_path)
    beside = binary(tmp_path / "venv" / "bin")
    assert find() == str(beside)
    chosen = binary(tmp_path / "chosen")
    assert find(VMD_FIRECRACKER=str(chosen)) == str(chosen)
    chosen.chmod(0o644)
    with pytest.raises(NotFound, match=r"VMD_FIRECRACKER: '.*' is not an executable file"):
        find(VMD_FIRECRACKER=str(tmp_path))
