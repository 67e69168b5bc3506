"""A page server for one VM: its socket, its handshake, its core."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import PagesFailed, VmdError
from .contract import Counters, Ended, EndReason, PageCore, Service
from .cores import core_name, make_core
from .handshake import Handshake, Listener, receive
from .regions import Regions
from .source import Image
from .stats import report


class PageServer:
    """Serves the first VMM that connects to ``listener`` with a good handshake, in this process.

    ``service`` makes the `Service` once the guest's page size is known (bytes). ``retry``: a peer
    that vanishes before its handshake is complete is warned of and another one awaited; without
    it the handshake fails. ``accept_seconds`` bounds the wait for a good handshake.

    Two futures tell the story: ``handshaken`` (the VMM's pid, or the error that ended the wait,
    or cancelled when stopped first) and ``ended`` (`Ended`). Both can be awaited through
    `asyncio.wrap_future`. The page server owns ``listener`` and ``image``.
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
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()  # guards _core against stop()
        self._core: PageCore | None = None
        self._handshake: Handshake | None = None
        self._plan: Service | None = None
        self._thread = threading.Thread(target=self._run, name="vmd-pages", daemon=True)

    def start(self) -> None:
        """Begin to wait for the VMM. Returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end, in the handshake as well as while serving. Returns at once; idempotent."""
        with self._lock:
            if self._stop_fd >= 0:
                os.eventfd_write(self._stop_fd, 1)
            if self._core is not None:
                self._core.stop()

    def close(self) -> Ended:
        """Stop, wait for the end, remove the socket. Idempotent."""
        self.stop()
        self._thread.join()
        with self._lock:
            for fd in (self._stop_fd, self.vmm_pidfd):
                if fd >= 0:
                    os.close(fd)
            self._stop_fd = self.vmm_pidfd = -1
        return self.ended.result()

    def abandon(self, reason: EndReason) -> Ended:
        """End for ``reason`` without waiting: its thread may be stuck on storage that does not answer.

        For a process that exits next, and takes the thread and all descriptors with it.
        """
        with suppress(InvalidStateError):  # it came to its end after all
            self.ended.set_result(Ended(reason))
        self._listener.close()
        return self.ended.result()

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
        state = "ended" if self.ended.done() else "serving" if self._core else "waiting"
        return report(self.core_name, state, self._handshake, self._plan, self.counters())

    def _run(self) -> None:
        try:
            ended = self._serve()
        except VmdError as failure:
            ended = Ended(EndReason.FAILED, str(failure))
            self._fail_handshake(failure)
        except BaseException as failure:  # a bug must end the wait of others, not only this thread
            ended = Ended(EndReason.FAILED, f"page server: {failure!r}")
            self._fail_handshake(PagesFailed(f"page server: {failure!r}"))
        finally:
            self._listener.close()
            self._image.close()
        with suppress(InvalidStateError):  # abandoned
            self.ended.set_result(ended)

    def _fail_handshake(self, failure: VmdError) -> None:
        if not self.handshaken.done():
            self.handshaken.set_exception(failure)

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
        self._listener.refuse_others()
        self._handshake = handshake
        self.vmm_pidfd = os.dup(handshake.pidfd) if handshake.pidfd >= 0 else -1
        core = self._start_core(handshake)
        self.handshaken.set_result(handshake.vmm_pid)
        return core.join()

    def _start_core(self, handshake: Handshake) -> PageCore:
        try:
            self._plan = self._service(handshake.regions.page_size)
            core = make_core(self.core_name, handshake, self._image, self._plan)
        except BaseException:
            handshake.close()
            raise
        core.start()
        with self._lock:
            self._core = core
            stopped = self._stop_fd >= 0 and _is_set(self._stop_fd)
        if stopped:  # stop() came between the handshake and here
            core.stop()
        return core


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
    image = Image(memory)
    try:
        listener = Listener(socket, owner=owner)
    except BaseException:
        image.close()
        raise
    server = PageServer(listener, image, service, core=core, retry=retry, accept_seconds=accept_seconds, warn=warn)
    server.start()
    return server
