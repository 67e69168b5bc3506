"""One VMM, all of its verbs, on real Firecracker."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import termios
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.vmm.conftest import MEM_MIB, Spawn, boot, run
from vmd import limits
from vmd.errors import TimedOut, VmmError
from vmd.vmm import process
from vmd.vmm.console import Console
from vmd.vmm.vmm import Vmm

pytestmark = pytest.mark.needs_kvm

AT_ONCE_SECONDS = 1.0
"""Far above what it takes, far below any bound that would otherwise end the wait."""


def test_boots_freezes_and_goes_on(booted: Spawn, tmp_path: Path) -> None:
    async def story() -> None:
        async with booted() as vmm:
            assert await vmm.console.ask("ping", 10) == "pong"
            await vmm.pause()
            await vmm.snapshot(tmp_path / "vmstate", tmp_path / "memory")
            assert (tmp_path / "memory").stat().st_size == MEM_MIB << 20
            await vmm.resume()
            assert "wrong=0" in await vmm.console.ask("check", 30)

    run(story())


@pytest.mark.parametrize("resume", [True, False], ids=["resumed", "paused"])
def test_loads_what_it_froze(spawned: Spawn, frozen: tuple[Path, Path], resume: bool) -> None:
    async def story() -> None:
        async with spawned() as vmm:
            vmstate, memory = frozen
            await vmm.load(vmstate, backend="File", backend_path=str(memory), resume=resume)
            if not resume:
                with pytest.raises(TimedOut, match=r"console: no answer to 'ping' within 0.2 s"):
                    await vmm.console.ask("ping", 0.2)
                await vmm.resume()
            answer = await vmm.console.ask("check", 30)
            assert answer.startswith("ok pages=")
            assert "wrong=0" in answer

    run(story())


def test_paths_are_relative_to_its_directory(booted: Spawn) -> None:
    async def story() -> None:
        async with booted() as vmm:
            await vmm.pause()
            await vmm.snapshot(Path("vmstate"), Path("memory"))
            assert {path.name for path in vmm.directory.iterdir()} == {
                "api.sock", "console.in", "console.out", "console.lock", "vmm.log", "vmstate", "memory",
            }  # fmt: skip

    run(story())


def test_a_directory_deeper_than_a_socket_address_can_name(firecracker: str, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)

    async def story() -> None:
        vmm = await Vmm.spawn(firecracker, deep, "deep", dies_with_parent=False)
        assert await vmm.version()
        await vmm.kill()

    run(story())


def test_seccomp_stays_on(booted: Spawn) -> None:
    async def story() -> None:
        async with booted() as vmm:
            for task in Path(f"/proc/{vmm.pid}/task").iterdir():
                assert "Seccomp:\t2" in (task / "status").read_text(), task

    run(story())


def test_its_own_words_are_kept(spawned: Spawn, micro: Path, frozen: tuple[Path, Path]) -> None:
    async def story() -> None:
        async with spawned() as vmm:
            with pytest.raises(VmmError, match=r"^PUT /boot-source: .* kernel file .* \(status 400\)$"):
                await vmm.boot(kernel=Path("/nowhere"), boot_args="", mem_mib=MEM_MIB, huge_pages=False)
            with pytest.raises(VmmError, match=r"^PATCH /vm: .* \(status 400\)$"):
                await vmm.pause()
            with pytest.raises(VmmError, match=r"^GET /nothing: Invalid .* GET nothing\. \(status 400\)$"):
                await vmm.api.request("GET", "/nothing", None, seconds=5)
            await vmm.boot(kernel=micro, boot_args="", mem_mib=MEM_MIB, huge_pages=False)
            with pytest.raises(VmmError, match=r"^PUT /snapshot/load: .* \(status 400\)$"):
                await vmm.load(frozen[0], backend="File", backend_path=str(frozen[1]), resume=True)

    run(story())


def test_the_balloon_takes_and_gives_back(spawned: Spawn, micro: Path) -> None:
    async def story() -> None:
        async with spawned() as vmm:
            await vmm.boot(kernel=micro, boot_args="", mem_mib=MEM_MIB, huge_pages=False, balloon=True)
            await vmm.console.wait_line("ready", 30)
            for mib in (4, 1, 0):
                await vmm.set_balloon(mib)
                async with asyncio.timeout(10):
                    while f" held={mib * 256} " not in (answer := await vmm.console.ask("balloon", 10)):
                        assert answer.startswith(f"ok device=1 target={mib * 256} ")
            assert "wrong=0" in await vmm.console.ask("check", 30)
            with pytest.raises(VmmError, match=r"^PATCH /balloon: .* \(status 400\)$"):
                await vmm.set_balloon(MEM_MIB + 1)

    run(story())


def test_no_balloon_unless_it_was_asked_for(booted: Spawn) -> None:
    async def story() -> None:
        async with booted() as vmm:
            with pytest.raises(VmmError, match=r"^PATCH /balloon: .*No balloon device found.* \(status 400\)$"):
                await vmm.set_balloon(1)

    run(story())


def test_a_torn_memory_file_is_refused(spawned: Spawn, frozen: tuple[Path, Path], tmp_path: Path) -> None:
    short = tmp_path / "memory"
    short.write_bytes(bytes(4096))

    async def story() -> None:
        async with spawned() as vmm:
            with pytest.raises(VmmError, match=r"^PUT /snapshot/load: "):
                await vmm.load(frozen[0], backend="File", backend_path=str(short), resume=True)

    run(story())


# --- ends ------------------------------------------------------------------------------------


def test_kill_is_idempotent_and_everybody_hears_of_it(spawned: Spawn) -> None:
    async def story() -> None:
        async with spawned() as vmm:
            waiting = [asyncio.create_task(vmm.exited()) for _ in range(3)]
            await asyncio.sleep(0)
            assert vmm.alive()
            await asyncio.gather(vmm.kill(), *waiting)
            assert not vmm.alive()
            await vmm.exited()
            await vmm.kill()
            with pytest.raises(ProcessLookupError):  # reaped: not even a zombie
                process.start_time(vmm.pid)

    run(story())


def test_kill_of_a_stopped_and_of_a_dead_vmm(spawned: Spawn) -> None:
    async def story() -> None:
        async with spawned() as vmm:
            os.kill(vmm.pid, signal.SIGSTOP)
            await vmm.kill()
            with pytest.raises(ProcessLookupError):
                process.start_time(vmm.pid)

    async def dead() -> None:
        async with spawned() as vmm:
            os.kill(vmm.pid, signal.SIGKILL)
            await vmm.exited()
            assert not vmm.alive()
            await vmm.kill()
            with pytest.raises(ProcessLookupError):
                process.start_time(vmm.pid)

    run(story())
    process.clean(Path(os.environ["VMD_RUN_DIR"]) / "vm")
    run(dead())


def test_closed_it_runs_on_for_another_owner(firecracker: str, micro: Path, vm_dir: Path) -> None:
    async def give_away() -> tuple[int, int]:
        vmm = await Vmm.spawn(firecracker, vm_dir, "t1", dies_with_parent=False)
        await boot(vmm, micro)
        vmm.close()
        vmm.close()
        return vmm.pid, vmm.start_time

    async def find_again(pid: int, started: int) -> None:
        assert await Console(vm_dir).ask("ping", 10) == "pong"
        assert process.find(pid, started + 1) is None
        pidfd = process.find(pid, started)
        assert pidfd is not None
        await process.kill(pidfd)
        os.close(pidfd)
        assert process.find(pid, started) is None
        with pytest.raises(VmmError, match="the VMM has exited"):
            await Console(vm_dir).ask("ping", 10)

    run(find_again(*run(give_away())))


Wait = Callable[[Vmm], Awaitable[object]]
WAITS: dict[str, Wait] = {
    "exited": lambda vmm: vmm.exited(),
    "request": lambda vmm: vmm.api.request("GET", "/version", None, seconds=30),
    "load": lambda vmm: vmm.load(Path("vmstate"), backend="File", backend_path="memory", resume=True),
    "ask": lambda vmm: vmm.console.ask("ping", 30),
    "wait_line": lambda vmm: vmm.console.wait_line("never", 30),
    "queued ask": lambda vmm: asyncio.gather(vmm.console.ask("ping", 30), vmm.console.ask("ping", 30)),
    "set_balloon": lambda vmm: vmm.set_balloon(1),
    "queued request": lambda vmm: asyncio.gather(vmm.version(), vmm.version()),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_each_wait_ends_with_the_vmm(booted: Spawn, wait: Wait) -> None:
    async def story() -> None:
        async with booted() as vmm:
            os.kill(vmm.pid, signal.SIGSTOP)  # so that nothing is answered before it dies
            waiting = asyncio.ensure_future(wait(vmm))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            os.kill(vmm.pid, signal.SIGKILL)
            began = time.monotonic()
            (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
            assert time.monotonic() - began < AT_ONCE_SECONDS
            assert outcome is None or isinstance(outcome, VmmError), outcome

    run(story())


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_each_wait_is_cancelled_at_once(booted: Spawn, wait: Wait) -> None:
    async def story() -> None:
        async with booted() as vmm:
            os.kill(vmm.pid, signal.SIGSTOP)
            waiting = asyncio.ensure_future(wait(vmm))
            await asyncio.sleep(0.05)
            began = time.monotonic()
            waiting.cancel()
            (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
            assert isinstance(outcome, asyncio.CancelledError)
            assert time.monotonic() - began < AT_ONCE_SECONDS
            os.kill(vmm.pid, signal.SIGCONT)
            # What was given up must not be taken for the answer to what comes next.
            assert await vmm.version() == await vmm.version()
            assert await vmm.console.ask("ping", 10) == "pong"

    run(story())


@pytest.mark.seed(39)
def test_a_load_is_bounded(spawned: Spawn, frozen: tuple[Path, Path]) -> None:
    assert limits.VMM_LOAD_SECONDS == 30

    async def story() -> None:
        async with spawned() as vmm:
            os.kill(vmm.pid, signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(TimedOut, match=r"^PUT /snapshot/load: no answer within 0.3 s$"):
                await vmm.load(frozen[0], backend="File", backend_path=str(frozen[1]), resume=True, seconds=0.3)
            assert 0.3 <= time.monotonic() - began < 0.3 + AT_ONCE_SECONDS

    run(story())


# --- spawning --------------------------------------------------------------------------------


def impostor(directory: Path, script: str) -> str:
    """Something else in Firecracker's place."""
    path = directory / "firecracker"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("dies_with_parent", [True, False], ids=["bound", "free"])
def test_a_failed_spawn_leaves_nothing(
    tmp_path: Path, vm_dir: Path, dies_with_parent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def spawn(firecracker: str) -> None:
        try:
            await Vmm.spawn(firecracker, vm_dir, "t1", dies_with_parent=dies_with_parent)
        finally:
            assert not vm_dir.exists()

    with pytest.raises(VmmError, match=r"exited|No such file"):
        run(spawn("/nowhere/firecracker"))
    with pytest.raises(VmmError, match=r"^spawn t1: connect .*/api.sock: the VMM has exited"):
        run(spawn("/bin/false"))
    monkeypatch.setattr(limits, "VMM_SOCKET_SECONDS", 0.2)
    with pytest.raises(TimedOut, match=r"/api.sock: nobody listens after 0.2 s"):
        run(spawn(impostor(tmp_path, "exec sleep 1000")))

    async def cancelled() -> None:
        monkeypatch.setattr(limits, "VMM_SOCKET_SECONDS", 30)
        spawning = asyncio.ensure_future(spawn(impostor(tmp_path, "exec sleep 1000")))
        await asyncio.sleep(0.1)
        spawning.cancel()
        await asyncio.gather(spawning, return_exceptions=True)
        assert spawning.cancelled()

    run(cancelled())


def test_the_error_of_a_failed_spawn_holds_its_last_words(tmp_path: Path, vm_dir: Path) -> None:
    with pytest.raises(VmmError, match=r"the VMM has exited; its log ends: out of luck$"):
        run(Vmm.spawn(impostor(tmp_path, "echo out of luck >&2"), vm_dir, "t1", dies_with_parent=False))


@pytest.mark.parametrize("name", ["api.sock", "console.out", "vmm.log"])
def test_spawn_spares_what_was_there(firecracker: str, vm_dir: Path, name: str) -> None:
    vm_dir.mkdir()
    (vm_dir / "disk").write_text("kept")
    (vm_dir / name).write_text("somebody else's")
    with pytest.raises(VmmError, match="File exists"):
        run(Vmm.spawn(firecracker, vm_dir, "t1", dies_with_parent=False))
    assert {path.name for path in vm_dir.iterdir()} == {"disk", name}


def test_spawn_where_there_is_no_directory(firecracker: str, vm_dir: Path) -> None:
    with pytest.raises(VmmError, match="No such file or directory"):
        run(Vmm.spawn(firecracker, vm_dir / "below", "t1", dies_with_parent=False))


# --- a guest that prints ---------------------------------------------------------------------


def test_a_guest_that_nobody_listens_to_fills_nothing(booted: Spawn) -> None:
    async def story() -> None:
        async with booted() as vmm:
            fill(vmm.directory / "console.out")
            stdin = os.open(vmm.directory / "console.in", os.O_WRONLY)
            os.write(stdin, b"help\n" * 20)  # 2,000 bytes dropped are 330 KB of log, if all of it were kept
            os.close(stdin)
            while held(vmm.directory / "vmm.log") < 60_000:
                await asyncio.sleep(0.001)
            # The commands before it are read, and their answers dropped or passed over.
            assert await vmm.console.ask("ping", 30) == "pong"
            for path in vmm.directory.iterdir():
                assert path.stat().st_size == 0, path
            assert "Failed the write to serial" in process.log_tail(vmm.directory)

    run(story())


def held(fifo: Path) -> int:
    """How many bytes wait in it."""
    fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        count = bytearray(4)
        fcntl.ioctl(fd, termios.FIONREAD, count)
        return int.from_bytes(count, sys.byteorder)
    finally:
        os.close(fd)


def fill(fifo: Path) -> None:
    fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"x" * 4095 + b"\n")
    os.close(fd)
