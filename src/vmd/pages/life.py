"""The life of a page server in this process: its thread, its stop, its end."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

from .. import limits
from ..errors import PagesFailed, VmdError
from .contract import Counters, Ended, EndReason, PageCore
from .journal import Journal
from .stats import ServedVm, report

NO_END = "the page server's core does not end"
"""All that is known of a core that is waited for in vain: storage may hold it, or a process in state D."""


class Server(ABC):
    """Runs a core to its end in a thread, whoever made the core and for whichever VM.

    ``journal``: what another process can go on from; removed at the end, unless there is a VM to go on with.

    Two futures tell the story: ``handshaken`` (the VMM's pid, or the error that ended the wait,
    or cancelled when stopped first) and ``ended`` (`Ended`). Both can be awaited through
    `asyncio.wrap_future`; a waiter that gives up cancels only its future, not the serving.
    """

    core_name: str

    def __init__(self, warn: Callable[[str], None], journal: Journal | None = None) -> None:
        self.handshaken: Future[int] = Future()
        self.ended: Future[Ended] = Future()
        self.vmm_pidfd = -1  # of the VMM, from the handshake to `close`; -1 also where it had died before
        self._warn = warn
        self._journal = journal
        self._lock = threading.Lock()  # guards _core and the two descriptors against stop(), and the end
        self._core: PageCore | None = None
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
        self._close_outlet()
        with self._lock:
            self._abandoned = True
            if not self._thread.is_alive():
                self._release()
        return ended

    def counters(self) -> Counters:
        """The core's counters; all zero before the handshake."""
        return self._core.counters() if self._core else Counters()

    def touched(self) -> list[int]:
        """File offsets of the pages that were faulted on, first-touch order (RECORD only)."""
        return list(self._core.touched()) if self._core else []

    def warnings(self) -> list[str]:
        """Take the core's warnings gathered since the last call."""
        return self._core.warnings() if self._core else []

    def stats(self) -> dict[str, Any]:
        """The object of ``--stats`` (interfaces.md)."""
        state = "ended" if self._end else "serving" if self._core else "waiting"
        return report(self.core_name, state, self._served(), self.counters())

    @abstractmethod
    def _served(self) -> ServedVm | None:
        """What is known of the VM; None before the handshake."""

    def _leaves_a_vm(self, reason: EndReason) -> bool:
        """Whether an end for ``reason`` leaves a VM that another process can go on with."""
        return self._core is not None and reason in (EndReason.STOPPED, EndReason.DIED)

    @abstractmethod
    def _serve(self) -> Ended:
        """Serve from beginning to end, on the thread."""

    @abstractmethod
    def _close_outlet(self) -> None:
        """Stop listening, where it listens. Idempotent."""

    @abstractmethod
    def _close_inputs(self) -> None:
        """Close what serving was made of. Idempotent."""

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

    def _start_core(self, core: PageCore) -> None:
        """Let it serve; what fails leaves its descriptors closed."""
        try:
            core.start()
        except BaseException:
            with suppress(Exception):
                core.join()
            raise
        with self._lock:
            self._core = core
            stopped = _is_set(self._stop_fd)
        if stopped:  # stop() came before there was a core
            core.stop()

    def _finish(self, ended: Ended) -> Ended:
        """Let it be known how it ended; the first to say so is right. Returns what the first said."""
        with self._lock:
            self._end = first = self._end or ended
        if self._journal is not None and not self._leaves_a_vm(first.reason):
            self._journal.remove()
        settle(self.ended, first)
        return first

    def _release(self) -> None:
        """Close what outlives the thread, for who polls it. Called with the lock held."""
        for fd in (self._stop_fd, self.vmm_pidfd):
            if fd >= 0:
                os.close(fd)
        self._stop_fd = self.vmm_pidfd = -1


def settle(future: Future[Any], outcome: object) -> None:
    """Give a future its result, or its exception; who waited may have given up and cancelled it."""
    with suppress(InvalidStateError):
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def _is_set(eventfd: int) -> bool:
    try:
        os.eventfd_read(eventfd)
    except BlockingIOError:
        return False
    return True
