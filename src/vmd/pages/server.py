"""A page server for one VM: its socket, its handshake, its core."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from .. import limits
from ..errors import HandshakeRefused, PagesFailed, VmdError
from . import peer
from .contract import Counters, Ended, EndReason, PageCore, Service
from .cores import core_name, make_core
from .handshake import Handshake, Listener, receive
from .regions import Regions
from .source import Image
from .stats import report

NO_END = "the page server's core does not end"
"""All that is known of a core that is waited for in vain: storage may hold it, or a process in state D."""


class PageServer:
    """Serves the first VMM that connects to ``listener`` with a good handshake, in this process.

    ``service`` makes the `Service` once the guest's page size is known (bytes). ``retry``: a peer
    that vanishes before its handshake is complete is warned of and another one awaited; without
    it the handshake fails. ``accept_seconds`` bounds the wait for a good handshake.

    Two futures tell the story: ``handshaken`` (the VMM's pid, or the error that ended the wait,
    or cancelled when stopped first) and ``ended`` (`Ended`). Both can be awaited through
    `asyncio.wrap_future`; a waiter that gives up cancels only its future, not the serving. The
    page server owns ``listener`` and ``image``, from the moment that its construction has succeeded.
    """

    def __init__(
        self,
        listener: Listener,
        image: Image,
        service: Callable[[int], Service],
        *,
        core: str | None = None,
        retry: bool = True,
        accept_seconds: float | None = None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.handshaken: Future[int] = Future()
        self.ended: Future[Ended] = Future()
        self.vmm_pidfd = -1  # of the VMM, from the handshake to `close`; -1 also where it had died before
        self.core_name = core_name(core)
        self._listener = listener
        self._image = image
        self._service = service
        self._retry = retry
        self._accept_seconds = accept_seconds
        self._warn = warn
        self._lock = threading.Lock()  # guards _core and the two descriptors against stop(), and the end
        self._core: PageCore | None = None
        self._handshake: Handshake | None = None
        self._plan: Service | None = None
        self._end: Ended | None = None  # `ended` may have been cancelled by who waited for it
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="vmd-pages", daemon=True)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def start(self) -> None:
        """Begin to wait for the VMM. Returns at once. Raises `PagesFailed`; then nothing of it is left."""
        try:
            self._thread.start()
        except RuntimeError as failure:  # no thread to be had
            refusal = PagesFailed(f"page server: {failure}")
            settle(self.handshaken, refusal)
            self._finish(Ended(EndReason.FAILED, str(refusal)))
            self.close()
            raise refusal from failure

    def stop(self) -> None:
        """Ask it to end, in the handshake as well as while serving. Returns at once; idempotent."""
        with self._lock:
            if self._stop_fd >= 0:
                os.eventfd_write(self._stop_fd, 1)
            if self._core is not None:
                self._core.stop()

    def close(self) -> Ended:
        """Stop, wait for the end, remove the socket. Idempotent.

        What does not end within `limits.PAGES_STOP_SECONDS` is abandoned: the caller may be an event
        loop with other VMs to look after.
        """
        self.stop()
        if self._thread.ident is None:  # it never began
            self._close_inputs()
        else:
            self._thread.join(limits.PAGES_STOP_SECONDS)
        if self._thread.is_alive():
            if not self._abandoned:
                self._warn(f"{NO_END}; going on without it")
            return self.abandon(EndReason.STOPPED)
        with self._lock:
            self._release()
        return self._finish(Ended(EndReason.STOPPED))

    def abandon(self, reason: EndReason) -> Ended:
        """End for ``reason`` without waiting: its thread may be stuck on storage that does not answer.

        The thread closes what it holds when it comes to its end, which may be that of the process.
        """
        ended = self._finish(Ended(reason))
        self._listener.close()
        with self._lock:
            self._abandoned = True
            if not self._thread.is_alive():
                self._release()
        return ended

    def counters(self) -> Counters:
        """The core's counters; all zero before the handshake."""
        return self._core.counters() if self._core else Counters()

    @property
    def regions(self) -> Regions | None:
        """The VM's memory map; None before the handshake."""
        return self._handshake.regions if self._handshake else None

    def touched(self) -> list[int]:
        """File offsets of the pages that were faulted on, first-touch order (RECORD only)."""
        return list(self._core.touched()) if self._core else []

    def warnings(self) -> list[str]:
        """Take the core's warnings gathered since the last call."""
        return self._core.warnings() if self._core else []

    def stats(self) -> dict[str, Any]:
        """The object of ``--stats`` (interfaces.md)."""
        state = "ended" if self._end else "serving" if self._core else "waiting"
        return report(self.core_name, state, self._handshake, self._plan, self.counters())

    def _run(self) -> None:
        try:
            ended = self._serve()
        except VmdError as failure:
            ended = Ended(EndReason.FAILED, str(failure))
            settle(self.handshaken, failure)
        except BaseException as failure:  # a bug must end the wait of others, not only this thread
            ended = Ended(EndReason.FAILED, f"page server: {failure!r}")
            settle(self.handshaken, PagesFailed(f"page server: {failure!r}"))
        self._close_inputs()
        self._finish(ended)
        with self._lock:
            if self._abandoned:
                self._release()

    def _finish(self, ended: Ended) -> Ended:
        """Let it be known how it ended; the first to say so is right. Returns what the first said."""
        with self._lock:
            self._end = first = self._end or ended
        settle(self.ended, first)
        return first

    def _close_inputs(self) -> None:
        self._listener.close()
        self._image.close()

    def _release(self) -> None:
        """Close what outlives the thread, for who polls it. Called with the lock held."""
        for fd in (self._stop_fd, self.vmm_pidfd):
            if fd >= 0:
                os.close(fd)
        self._stop_fd = self.vmm_pidfd = -1

    def _serve(self) -> Ended:
        handshake = receive(
            self._listener,
            self._image.size,
            self._stop_fd,
            accept_seconds=self._accept_seconds,
            retry=self._retry,
            warn=self._warn,
        )
        if handshake is None:
            self.handshaken.cancel()
            return Ended(EndReason.STOPPED)
        core = self._begin(handshake)
        settle(self.handshaken, handshake.vmm_pid)
        return core.join()

    def _begin(self, handshake: Handshake) -> PageCore:
        """From a good handshake to a core that serves, or to a VMM that is dead: it would wait for ever."""
        held = -1
        try:
            self._listener.refuse_others()
            self._handshake = handshake
            # While the VMM lives its userfaultfd stays open, or the guest goes on with zeros: a core
            # that cannot start has closed its own.
            held = os.dup(handshake.uffd)
            self.vmm_pidfd = os.dup(handshake.pidfd) if handshake.pidfd >= 0 else -1
            return self._start_core(handshake)
        except HandshakeRefused:  # not the VM that this server is for: not ours to kill
            handshake.close()
            raise
        except BaseException as failure:
            _kill(handshake.pidfd if self.vmm_pidfd < 0 else self.vmm_pidfd)
            handshake.close()
            why = f"page server: cannot begin to serve vmm {handshake.vmm_pid}, which is killed"
            raise PagesFailed(f"{why}: {_words(failure)}") from failure
        finally:
            if held >= 0:
                os.close(held)

    def _start_core(self, handshake: Handshake) -> PageCore:
        self._plan = self._service(handshake.regions.page_size)
        core = make_core(self.core_name, handshake, self._image, self._plan)
        try:
            core.start()
        except BaseException:
            with suppress(Exception):
                core.join()
            raise
        with self._lock:
            self._core = core
            stopped = _is_set(self._stop_fd)
        if stopped:  # stop() came between the handshake and here
            core.stop()
        return core


def settle(future: Future[Any], outcome: object) -> None:
    """Give a future its result, or its exception; who waited may have given up and cancelled it."""
    with suppress(InvalidStateError):
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _kill(pidfd: int) -> None:
    """Kill the VMM and see it dead: while it lives, no descriptor that its memory hangs on may be closed."""
    if pidfd >= 0:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        peer.has_exited(pidfd, limits.PAGES_STOP_SECONDS)


def _words(failure: BaseException) -> str:
    if isinstance(failure, VmdError):
        return str(failure)
    return (failure.strerror if isinstance(failure, OSError) else None) or repr(failure)


def _is_set(eventfd: int) -> bool:
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        return False
    return True


def serve_pages(
    socket: Path,
    memory: Path,
    service: Callable[[int], Service],
    *,
    owner: tuple[int, int] | None = None,
    core: str | None = None,
    retry: bool = True,
    accept_seconds: float | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> PageServer:
    """Open ``memory``, listen on ``socket``, start a `PageServer`. Raises `VmdError`, leaving nothing."""
    core = core_name(core)
    with ExitStack() as undo:
        image = Image(memory)
        undo.callback(image.close)
        listener = Listener(socket, owner=owner)
        undo.callback(listener.close)
        try:
            server = PageServer(
                listener, image, service, core=core, retry=retry, accept_seconds=accept_seconds, warn=warn
            )
        except OSError as failure:
            raise VmdError(f"page server: {failure.strerror}") from failure
        server.start()
        undo.pop_all()
    return server
