"""Stage 4: thaw. The only long story, told in short steps.

A restore takes a slot among the concurrent ones, makes the run directory, lets the page server
listen, spawns the VMM, loads the snapshot while the handshake goes on beside it, lets the guest run
and asks it whether it is there. `Step` is that list, and the seam ``at`` is called after each of
them, so that a test can fail or cancel a restore anywhere. Whatever ends it, a failure or the
caller's cancellation, all that was made is undone before the caller hears of it: the VMM is killed,
then the page server goes, then the directory with its sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from . import limits
from .backend import Backend, Choice, Request, choose_backend, plan_service, words
from .errors import HandshakeRefused, PagesFailed, RestoreFailed, TimedOut, VmdError, VmmError
from .pages.contract import Ended, Service
from .pages.cores import core_name
from .pages.detached import DetachedPages
from .pages.server import PageServer, serve_pages
from .settings import Settings
from .slots import slot
from .store import Owned, runs
from .tasks import both, cancel, finish
from .vmm import process
from .vmm.process import find_firecracker
from .vmm.vmm import Vmm

T = TypeVar("T")

PAGES_SOCKET = "pages.sock"
"""The page server's socket in a sandbox's run directory."""

READY_ASK, READY_ANSWER = "ping", "pong"
"""How the built-in guest says that it is there."""

# A VMM that refuses a load answers and exits: its answer, already sent, says more than its death.
_LAST_WORDS_SECONDS = 0.5

# Firecracker takes letters, digits and hyphens, 64 at most, for an id that only its log shows.
_VMM_ID_CHARS_MAX = 64


class Step(enum.StrEnum):
    """The steps of a restore, in order, each by the words that an error's text has for it.

    LISTEN and HANDSHAKE are passed over under the File backend, RESUME and READY when the caller
    wants to resume by itself. LOAD and HANDSHAKE go on at the same time, and LOAD does what RESUME
    names, unless the caller resumes.
    """

    SLOT = "wait for a slot"
    DIRECTORY = "make the run directory"
    LISTEN = "start the page server"
    SPAWN = "spawn the VMM"
    LOAD = "load snapshot"
    HANDSHAKE = "handshake"
    RESUME = "resume"
    READY = "wait until the guest answers"


STEPS = tuple(Step)

Seam = Callable[[Step], Awaitable[None]]


async def _no_seam(step: Step) -> None:
    """Nothing happens between the steps outside of tests."""


async def restore(
    request: Request,
    settings: Settings,
    *,
    resume: bool = True,
    warn: Callable[[str], None] = lambda line: None,
    at: Seam = _no_seam,
) -> Restored:
    """Thaw ``request.snapshot`` under ``VMD_RUN_DIR/<sandbox_id>/`` and return it, answering.

    ``resume=False`` returns it loaded and still paused: call `Restored.resume` and `Restored.ready`.
    Raises `SnapshotError` and `BackendUnavailable` before anything is made, later `RestoreFailed`; then, as
    after a cancellation, nothing is left.
    """
    firecracker = Path(find_firecracker(settings))
    choice = choose_backend(request.backend, settings, request.snapshot.page_size)
    with _named(f"restore sandbox {request.sandbox_id}: check snapshot {request.name}"):
        request.snapshot.check()
        await request.snapshot.require_format(firecracker)
    restored = Restored(request, settings, choice, warn, at)
    try:
        async with slot(settings):
            await at(Step.SLOT)
            await restored._thaw(firecracker, resume)
    except BaseException as failure:
        await _undo(restored, failure)
        if isinstance(failure, VmdError):
            raise RestoreFailed(f"restore sandbox {request.sandbox_id}: {failure}", hint=failure.hint) from failure
        raise
    return restored


class Restored:
    """A thawed VM: owns the VMM, the page server and the run directory until `close` or `forget`.

    ``timings_ms`` has ``spawn``, ``handshake`` and ``load`` (both since the load began), ``resume`` (0 where the load
    itself resumed: one wake-up less beside a guest that runs already), ``ready`` (the guest's first answer) and
    ``total``; what did not happen is 0.
    """

    def __init__(
        self, request: Request, settings: Settings, choice: Choice, warn: Callable[[str], None], at: Seam
    ) -> None:
        self.request = request
        self.backend: Backend = choice.backend
        self.backend_reason = choice.reason
        self.timings_ms = dict.fromkeys(("spawn", "handshake", "load", "resume", "ready", "total"), 0.0)
        self.pages: PageServer | DetachedPages | None = None
        self._settings = settings
        self._warn = warn
        self._at = at
        self._memory = request.snapshot.memory
        self._owned: Owned | None = None
        self._vmm: Vmm | None = None
        self._ended: asyncio.Future[Any] | None = None
        self._handshaken: asyncio.Future[int] | None = None
        self._began = time.monotonic()

    @property
    def vmm(self) -> Vmm:
        """The VMM that runs it."""
        assert self._vmm is not None
        return self._vmm

    @property
    def directory(self) -> Path:
        """The run directory: sockets, FIFOs, the VMM's log."""
        assert self._owned is not None
        return self._owned.path

    def pages_alive(self) -> bool:
        """Whether its pages are still served; always under the File backend."""
        return self._ended is None or not self._ended.done()

    async def resume(self) -> None:
        """Let the guest run. Raises `VmdError`; the caller closes."""
        with _named(Step.RESUME), self._timed("resume"):
            await self._while_alive(self.vmm.resume())
        await self._at(Step.RESUME)

    async def ready(self) -> None:
        """Wait until the guest answers. Raises `VmdError`; the caller closes."""
        with _named(Step.READY), self._timed("ready"):
            answer = await self._while_alive(self.vmm.console.ask(READY_ASK, limits.GUEST_READY_SECONDS))
            if answer != READY_ANSWER:
                raise VmmError(f"the guest answered {answer[:80]!r} to {READY_ASK}")
        self.timings_ms["total"] = _ms_since(self._began)
        await self._at(Step.READY)

    async def ask(self, line: str, seconds: float) -> str:
        """One command line to the guest; its answer. Ends at once when VMM or page server does.

        Raises `VmmError`, `PagesFailed`, `TimedOut`, `UsageError`.
        """
        return await self._while_alive(self.vmm.console.ask(line, seconds))

    async def close(self) -> None:
        """Kill the VMM, end the page server, remove the directory: each even when one before it failed.

        Idempotent; run it through `finish` where the caller may be cancelled.
        """
        async with contextlib.AsyncExitStack() as undo:
            if self._owned is not None:
                undo.callback(self._owned.discard)
            if self.pages is not None:
                undo.push_async_callback(self._close_pages, self.pages)
            if self._vmm is not None:
                undo.push_async_callback(self._vmm.kill)
        if self._handshaken is not None and self._handshaken.done() and not self._handshaken.cancelled():
            self._handshaken.exception()  # seen: asyncio need not complain of it

    def forget(self) -> None:
        """Leave VMM and page server running and drop what this process holds of them."""
        if self._ended is not None:
            self._ended.cancel()
        if isinstance(self.pages, DetachedPages):
            self.pages.forget()
        elif self.pages is not None:
            self.pages.close()  # the pager goes on
        self.vmm.close()
        assert self._owned is not None
        self._owned.disown()

    async def _thaw(self, firecracker: Path, resume: bool) -> None:
        self._began = time.monotonic()
        await self._make_directory()
        if self.backend == "uffd":
            await self._listen()
        await self._spawn(firecracker)
        await self._load(resume)
        if resume:
            await self._at(Step.RESUME)
            await self.ready()

    async def _make_directory(self) -> None:
        registry = runs(self._settings)
        with _named(Step.DIRECTORY):
            async with registry.locked_async():
                self._owned = registry.own(self.request.sandbox_id)
            self._memory = self.request.link_image()
        await self._at(Step.DIRECTORY)

    async def _listen(self) -> None:
        with _named(Step.LISTEN):
            service = plan_service(self.request, self._settings, self._warn)
            self.pages = pages = self._start_pages(service)
            self._handshaken = asyncio.wrap_future(pages.handshaken)
            self._ended = _end_of(pages)
        await self._at(Step.LISTEN)

    def _start_pages(self, service: Service) -> PageServer | DetachedPages:
        snapshot, socket = self.request.snapshot, self.directory / PAGES_SOCKET
        core = self._settings.core
        memory, page_size = self._memory, snapshot.page_size
        if not self.request.detached:
            return serve_pages(socket, memory, lambda _: service, core=core, retry=False, warn=self._warn)
        if core_name(core) == "reference":
            return DetachedPages(socket, memory, service, page_size, self.directory, core=core)
        from .pager.handed import hand_over  # it imports the native core

        name = self.request.sandbox_id
        return hand_over(self._settings, name, self.directory, socket, memory, service, page_size, self._warn)

    async def _close_pages(self, pages: PageServer | DetachedPages) -> None:
        pages.stop()
        if self._ended is not None:  # so that close, which holds the loop, has nothing to wait for
            await asyncio.wait([self._ended], timeout=limits.PAGES_STOP_SECONDS)
        pages.close()

    async def _spawn(self, firecracker: Path) -> None:
        with _named(Step.SPAWN), self._timed("spawn"):
            self._vmm = await Vmm.spawn(
                str(firecracker),
                self.directory,
                _vmm_id(self.request.sandbox_id),
                dies_with_parent=not self.request.detached,
            )
        await self._at(Step.SPAWN)

    async def _load(self, resume: bool) -> None:
        began = time.monotonic()
        if self._handshaken is None:
            await self._while_alive(self._load_snapshot(began, resume))
        else:
            await self._while_alive(self._load_and_shake_hands(began, resume))
        await self._at(Step.LOAD)
        if self._handshaken is not None:
            await self._at(Step.HANDSHAKE)

    async def _load_and_shake_hands(self, began: float, resume: bool) -> None:
        try:
            await both(self._load_snapshot(began, resume), self._shake_hands(began))
        except VmmError:
            # A page server that cannot begin to serve kills the VMM first, and then says why.
            if self._handshaken is not None and isinstance(self.pages, PageServer) and self.pages.regions is not None:
                await asyncio.wait([self._handshaken], timeout=_LAST_WORDS_SECONDS)
                self._judge_handshake()
            raise

    async def _load_snapshot(self, began: float, resume: bool) -> None:
        snapshot = self.request.snapshot
        path = PAGES_SOCKET if self.backend == "uffd" else str(self._memory)
        with _named(f"{Step.LOAD} {self.request.name}"):
            await self.vmm.load(
                snapshot.vmstate,
                backend="Uffd" if self.backend == "uffd" else "File",
                backend_path=path,
                resume=resume,
                seconds=limits.VMM_LOAD_SECONDS,
            )
        self.timings_ms["load"] = _ms_since(began)

    async def _shake_hands(self, began: float) -> None:
        assert self._handshaken is not None
        bound = limits.VMM_LOAD_SECONDS + limits.HANDSHAKE_PEER_SECONDS  # a load that hangs is told first
        await asyncio.wait([self._handshaken], timeout=bound)
        self._judge_handshake()
        if not self._handshaken.done():
            raise TimedOut(f"{Step.HANDSHAKE}: the VMM sent none within {bound:g} s")
        self.timings_ms["handshake"] = _ms_since(began)

    def _judge_handshake(self) -> None:
        """Raise the handshake's own failure where it has one; it says more than what follows from it."""
        with _named(Step.HANDSHAKE):
            if self._handshaken is None or not self._handshaken.done():
                return
            if self._handshaken.cancelled():
                raise PagesFailed("the page server was stopped")
            pid = self._handshaken.result()
            if pid != self.vmm.pid:
                raise HandshakeRefused(f"process {pid} connected, not the VMM {self.vmm.pid}")

    async def _while_alive(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``; cut short, with the reason, when VMM or page server ends before it."""
        task = asyncio.ensure_future(work)
        exited = asyncio.ensure_future(self.vmm.exited())
        watched = {task, exited} if self._ended is None else {task, exited, self._ended}
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and not self.vmm.alive():
                await asyncio.wait([task], timeout=_LAST_WORDS_SECONDS)
            if not task.done():
                self._judge_handshake()
                raise self._death()
        finally:
            await cancel(task, exited)
        return task.result()

    def _death(self) -> VmdError:
        ended = self._ended.result() if self._ended is not None and self._ended.done() else None
        if isinstance(ended, Ended) and ended.error is not None:
            return PagesFailed(f"page server: {ended.error}")
        if not self.vmm.alive():
            log = process.log_tail(self.vmm.directory)
            return VmmError("the VMM has exited" + (f"; its log ends: {log}" if log else ""))
        return PagesFailed("the page server has ended")

    @contextlib.contextmanager
    def _timed(self, key: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.timings_ms[key] = _ms_since(began)


def _end_of(pages: PageServer | DetachedPages) -> asyncio.Future[Any]:
    """Done when the page server has ended; gives its `Ended` where it served in this process."""
    if isinstance(pages, PageServer):
        return asyncio.wrap_future(pages.ended)
    pidfd = os.pidfd_open(pages.pid)  # a child that nobody has waited for: the pid is its own
    ended = asyncio.ensure_future(process.exited(pidfd))
    ended.add_done_callback(lambda _: os.close(pidfd))
    return ended


async def _undo(restored: Restored, failure: BaseException) -> None:
    try:
        await finish(restored.close())
    except VmdError as left:  # the failure that led here is what the caller must hear of
        failure.add_note(f"undo: {left}")


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Put intent before the words of a failure; its class stays, because callers act by it."""
    try:
        yield
    except VmdError as failure:
        raise type(failure)(f"{what}: {failure}", hint=failure.hint) from failure
    except OSError as failure:
        raise VmdError(f"{what}: {words(failure)}") from failure


def _ms_since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 3)


def _vmm_id(sandbox_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", sandbox_id)[:_VMM_ID_CHARS_MAX]
