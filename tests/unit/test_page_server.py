"""A page server in this process: what it leaves when it cannot serve, and whom it waits for."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.fakes.vmm import FakeVmm, eventually
from tests.system.pages_serve.command import MakeMemory, MakeVmm
from tests.system.pages_serve.storage import SilentStorage
from vmd import limits
from vmd.errors import HandshakeRefused, VmdError
from vmd.pages import cores, server
from vmd.pages.contract import Beside, Ended, EndReason, Service
from vmd.pages.server import PageServer, serve_pages

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd

CORES = pytest.mark.parametrize("core", ["native", "reference"])
Begin = Callable[..., PageServer]


@pytest.fixture
def begin(run_dir: Path) -> Iterator[Begin]:
    """Start a page server at ``run_dir/s``; at the end it is closed."""
    with ExitStack() as stack:

        def start(memory: Path, service: Service | Callable[[int], Service] = Service(), **keys: object) -> PageServer:  # noqa: B008
            made = service if callable(service) else lambda _: service
            started = serve_pages(run_dir / "s", memory, made, retry=False, **keys)  # type: ignore[arg-type]
            stack.callback(started.close)
            return started

        yield start


def freeze(vmm: FakeVmm) -> None:
    """One of its threads waits for a page, before anybody serves."""
    vmm.start("read", [1])
    eventually(vmm.blocked, "a thread waits")


def shake_last_hands(vmm: FakeVmm, path: Path) -> None:
    """A handshake of which the VMM dies, maybe before it has told its driver of it."""
    with suppress(EOFError):
        vmm.handshake(path)


# --- a VMM that cannot be served is killed -------------------------------------------------------------


def _no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def _too_many(*_: object, **__: object) -> int:
    raise OSError(24, "Too many open files")


@CORES
def test_a_service_that_cannot_be_made_kills_the_vmm(
    begin: Begin, make_memory: MakeMemory, make_vmm: MakeVmm, run_dir: Path, core: str
) -> None:
    def refuse(_: int) -> Service:
        raise OverflowError("int too big to convert")

    memory = make_memory(16)
    pages, vmm = begin(memory, refuse, core=core), make_vmm(memory)
    freeze(vmm)
    shake_last_hands(vmm, run_dir / "s")
    assert vmm.wait() == -signal.SIGKILL
    ended = pages.ended.result(10)
    assert ended.reason is EndReason.FAILED
    assert f"vmm {vmm.pid}, which is killed: OverflowError" in str(ended.error)
    with pytest.raises(VmdError, match="OverflowError"):
        pages.handshaken.result(10)


@CORES
def test_descriptors_that_cannot_be_had_kill_the_vmm(
    begin: Begin, make_memory: MakeMemory, make_vmm: MakeVmm, run_dir: Path, core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make_memory(16)
    pages, vmm = begin(memory, core=core), make_vmm(memory)
    freeze(vmm)
    monkeypatch.setattr(os, "dup", _too_many)
    shake_last_hands(vmm, run_dir / "s")
    assert vmm.wait() == -signal.SIGKILL
    assert str(pages.ended.result(10).error).endswith("Too many open files")


class _Stillborn:
    """A core of which no thread can be started."""

    def __init__(self, *words: object) -> None:
        self._core = cores.make_core(*words)  # type: ignore[arg-type]

    def start(self) -> None:
        raise RuntimeError("can't start new thread")

    def join(self) -> Ended:
        return self._core.join()


@CORES
def test_a_core_that_cannot_start_kills_the_vmm_before_its_memory_is_let_go(
    begin: Begin, make_memory: MakeMemory, make_vmm: MakeVmm, run_dir: Path, core: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make_memory(16)
    pages, vmm = begin(memory, core=core), make_vmm(memory)
    freeze(vmm)
    monkeypatch.setattr(server, "make_core", _Stillborn)
    shake_last_hands(vmm, run_dir / "s")
    assert vmm.wait() == -signal.SIGKILL  # and not a thread that went on with zeros
    assert "can't start new thread" in str(pages.ended.result(10).error)
    assert pages.close().reason is EndReason.FAILED


def test_a_vm_that_is_not_the_one_meant_is_refused_and_spared(
    begin: Begin, make_memory: MakeMemory, make_vmm: MakeVmm, run_dir: Path
) -> None:
    def refuse(page_size: int) -> Service:
        raise HandshakeRefused(f"page size: got {page_size}")

    memory = make_memory(16)
    pages, vmm = begin(memory, refuse), make_vmm(memory)
    vmm.handshake(run_dir / "s")
    with pytest.raises(HandshakeRefused, match="page size: got 4096"):
        pages.handshaken.result(10)
    assert pages.ended.result(10) == Ended(EndReason.FAILED, "page size: got 4096")
    assert vmm.is_alive()


# --- nothing is left of what did not begin -------------------------------------------------------------


def test_a_core_that_is_not_there_leaves_no_socket(
    make_memory: MakeMemory, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: str | None) -> str:
        raise VmdError("core native: not installed")

    monkeypatch.setattr(server, "core_name", missing)
    with pytest.raises(VmdError, match="not installed"):
        serve_pages(run_dir / "s", make_memory(4), lambda _: Service())
    assert not (run_dir / "s").exists()


@pytest.mark.parametrize("what", ["thread", "eventfd"])
def test_what_cannot_be_had_leaves_no_socket(
    make_memory: MakeMemory, run_dir: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    memory = make_memory(4)
    monkeypatch.setattr(*((threading.Thread, "start", _no_thread) if what == "thread" else (os, "eventfd", _too_many)))
    with pytest.raises(VmdError, match=r"new thread|open files"):
        serve_pages(run_dir / "s", memory, lambda _: Service())
    assert not (run_dir / "s").exists()


# --- waiters that give up --------------------------------------------------------------------------------


def test_a_waiter_that_gives_up_does_not_end_the_serving(
    begin: Begin, make_memory: MakeMemory, make_vmm: MakeVmm, run_dir: Path
) -> None:
    memory = make_memory(16)
    pages, vmm = begin(memory), make_vmm(memory)

    async def give_up(future: Future[int] | Future[Ended]) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(future), 0.01)

    for future in (pages.handshaken, pages.ended):
        asyncio.run(give_up(future))
    vmm.handshake(run_dir / "s")
    assert vmm.verdicts() == ["image"] * 16
    assert pages.stats()["state"] == "serving"
    vmm.kill()
    eventually(lambda: pages.stats()["state"] == "ended", "it ends with its VMM")
    assert pages.close() == Ended(EndReason.GONE)


# --- storage that does not answer ------------------------------------------------------------------------


@CORES
def test_close_does_not_wait_for_storage(make_memory: MakeMemory, make_vmm: MakeVmm, run_dir: Path, core: str) -> None:
    memory = make_memory(16)
    vmm = make_vmm(memory)
    said: list[str] = []
    with SilentStorage(memory) as storage:
        watchdog = threading.Timer(10, storage.close)
        watchdog.start()
        pages = serve_pages(
            run_dir / "s", memory, lambda _: Service(Beside.NOTHING), core=core, retry=False, warn=said.append
        )
        vmm.handshake(run_dir / "s")
        vmm.start("read", [5])
        storage.wait()
        since = time.monotonic()
        assert pages.close() == Ended(EndReason.STOPPED)
        assert time.monotonic() - since < limits.PAGES_STOP_SECONDS + 1
        assert pages.close() == Ended(EndReason.STOPPED)
        assert said == ["the page server's core does not end; going on without it"]
        assert not (run_dir / "s").exists()
        watchdog.cancel()
        watchdog.join()
    # The storage answers: its thread ends and takes the descriptors with it (the watch of every test).
