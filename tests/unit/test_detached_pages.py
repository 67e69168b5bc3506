"""A page server in a process of its own: what its maker leaves, and how long it waits."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.support.leaks import descriptors
from tests.system.pages_serve.command import MakeMemory, MakeVmm
from vmd import limits
from vmd.errors import HandshakeRefused, VmdError
from vmd.pages import cores, detached
from vmd.pages.contract import Service
from vmd.pages.detached import DetachedPages

pytest_plugins = ["tests.system.pages_serve.fixtures"]

Begin = Callable[[Path], DetachedPages]


@pytest.fixture
def begin(run_dir: Path, tmp_path: Path) -> Iterator[Begin]:
    """Start one at ``run_dir/s``; at the end it is closed."""
    with ExitStack() as stack:

        def start(memory: Path, page_size: int = 4096) -> DetachedPages:
            pages = DetachedPages(run_dir / "s", memory, Service(), page_size, tmp_path)
            stack.callback(pages.close)
            return pages

        yield start


def _no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def _too_many(*_: object, **__: object) -> int:
    raise OSError(24, "Too many open files")


FAILURES = {"thread": (threading.Thread, "start", _no_thread), "pipe": (os, "pipe2", _too_many)}


@pytest.mark.parametrize("what", [*FAILURES, "spawn"])
def test_what_cannot_be_had_leaves_nothing(
    begin: Begin, make_memory: MakeMemory, run_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    memory, before = make_memory(4), descriptors()
    monkeypatch.setattr(*FAILURES.get(what, (detached, "_spawn", _too_many)))
    with pytest.raises(VmdError, match=r"new thread|open files"):
        begin(memory)
    assert not (run_dir / "s").exists()
    assert descriptors() == before


def test_a_core_that_is_not_there_leaves_no_socket(
    begin: Begin, make_memory: MakeMemory, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMD_CORE", "native")
    monkeypatch.setattr(cores, "CORE_VERSION", "0")
    with pytest.raises(VmdError, match="core native: expected version 0"):
        begin(make_memory(4))
    assert not (run_dir / "s").exists()


def test_close_does_not_wait_for_a_process_that_does_not_die(
    begin: Begin, make_memory: MakeMemory, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = begin(make_memory(4))
    pidfd = os.pidfd_open(pages.pid)
    monkeypatch.setattr(subprocess.Popen, "send_signal", lambda *_: None)  # as in state D, where no signal acts
    watchdog = threading.Timer(10, os.kill, (pages.pid, signal.SIGKILL))
    watchdog.start()
    since = time.monotonic()
    pages.close()
    took = time.monotonic() - since
    watchdog.cancel()
    watchdog.join()
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # and it is reaped: the watch of every test
    os.close(pidfd)
    assert took < 3 * limits.PAGES_STOP_SECONDS + 1
    assert pages.handshaken.cancelled()
    assert not (run_dir / "s").exists()
    pages.close()


@pytest.mark.needs_uffd
def test_a_waiter_that_gives_up_is_none_the_process_minds(
    begin: Begin, make_memory: MakeMemory, make_vmm: MakeVmm, run_dir: Path
) -> None:
    memory = make_memory(16)
    pages, vmm = begin(memory), make_vmm(memory)

    async def give_up() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(pages.handshaken), 0.01)

    asyncio.run(give_up())
    vmm.handshake(run_dir / "s")
    assert vmm.verdicts() == ["image"] * 16


@pytest.mark.needs_uffd
def test_a_vm_of_other_pages_is_refused_and_spared(
    begin: Callable[[Path, int], DetachedPages], make_memory: MakeMemory, make_vmm: MakeVmm, run_dir: Path
) -> None:
    memory = make_memory(16)
    pages, vmm = begin(memory, 2 << 20), make_vmm(memory)
    vmm.handshake(run_dir / "s")
    with pytest.raises(HandshakeRefused, match="page size: expected the template's 2097152, got 4096"):
        pages.handshaken.result(10)
    assert vmm.is_alive()


# --- the child's word ------------------------------------------------------------------------------------


def test_a_report_on_a_high_descriptor_is_written_and_closed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2048, hard), hard))
    reading, writing = os.pipe()
    high = 1500
    try:
        os.dup2(writing, high)
        os.close(writing)
        detached._report(high, {"vmm": 7})
        with os.fdopen(reading, "rb") as report:
            assert json.loads(report.read()) == {"vmm": 7}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("reader", ["gone", "full"])
def test_a_report_that_nobody_takes_holds_nothing_up(reader: str) -> None:
    reading, writing = os.pipe()
    if reader == "gone":
        os.close(reading)
    else:
        os.set_blocking(writing, False)
        os.write(writing, bytes(1 << 20))
        os.set_blocking(writing, True)
    detached._report(writing, {"vmm": 7})
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writing)
    if reader != "gone":
        os.close(reading)


def test_any_failure_of_the_child_is_reported(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    order = dict.fromkeys(detached._Order.__slots__, 0) | {"report": writing, "directory": str(tmp_path), "beside": "x"}
    words = [sys.executable, "-m", "vmd.pages.detached", json.dumps(order)]
    with os.fdopen(reading, "rb") as report:
        done = subprocess.run(words, pass_fds=[writing], capture_output=True, text=True, timeout=20)
        os.close(writing)
        assert "page server: FileNotFoundError" in json.loads(report.read())["error"]
    assert done.returncode == 1
    assert done.stderr.startswith("vmd: error: ")
    assert done.stderr.count("\n") == 1


def test_it_takes_the_descriptors_that_it_may_have(begin: Begin, make_memory: MakeMemory) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        pages = begin(make_memory(4))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wanted = min(hard, 1 << 16)
    eventually(lambda: resource.prlimit(pages.pid, resource.RLIMIT_NOFILE) == (wanted, hard), "the limit is raised")
