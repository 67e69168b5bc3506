"""The fault thread of the reference core, and the life of the whole.

One fault thread reads the userfaultfd and serves demand; one filler thread replays or prefetches.
A turn of the fault thread: read all queued messages, apply every REMOVE, only then look at the
faults (the kernel hands out faults before an earlier REMOVE). A fault that is refused with EAGAIN
is parked and tried again, by a timer and in each turn, until it is served or its time is up; the
kernel does not repeat it, so none is ever dropped.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
import time
from array import array
from contextlib import suppress
from typing import Literal

from ... import limits
from .. import peer, uffd
from ..contract import Beside, Counters, Ended, EndReason, Outcome, PageState, Service
from ..handshake import Handshake
from ..source import Image
from .filler import Filler
from .memory import Installer, Memory
from .tally import Tally

_READ_BYTES = 64 * uffd.MESSAGE_BYTES
_RETRY_FIRST_SECONDS = 0.0001
_RETRY_LAST_SECONDS = 0.002


class _EndError(Exception):
    """Serving is over; `ended` says how."""

    def __init__(self, reason: EndReason, error: str | None = None) -> None:
        super().__init__(error)
        self.ended = Ended(reason, error)


class ReferenceCore:
    """`contract.PageCore`, in Python. Owns the handshake and the image from the start."""

    name: Literal["native", "reference"] = "reference"

    def __init__(self, handshake: Handshake, image: Image, service: Service) -> None:
        self._handshake = handshake
        self._image = image
        self._service = service
        self._regions = handshake.regions
        self._tally = Tally()
        installer = Installer(handshake.uffd, service.injections)
        self._memory = Memory(installer, handshake.regions, image, self._tally)
        self._filler = Filler(self._memory, service, self._tally)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ended_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._owner_lock = threading.Lock()  # guards the two eventfds and the end of join
        self._thread: threading.Thread | None = None
        self._ended = Ended(EndReason.STOPPED)
        self._parked: dict[int, list[float]] = {}  # page: when its faults were read
        self._retry_seconds = _RETRY_FIRST_SECONDS
        self._touched: dict[int, None] = {}  # pages in first-touch order
        self._lost_pages = 0
        self._unknown_events: set[int] = set()

    # --- contract --------------------------------------------------------------------------------

    @property
    def ended_fd(self) -> int:
        """An eventfd, readable once the core has ended; valid until `join` has returned."""
        return self._ended_fd

    def start(self) -> None:
        """Begin to serve. Call once."""
        thread = threading.Thread(target=self._run, name="vmd-faults", daemon=True)
        thread.start()
        self._thread = thread  # only now: join() waits for one that runs

    def stop(self) -> None:
        """Ask it to end. Returns at once; idempotent; from any thread."""
        with self._owner_lock:
            if self._stop_fd >= 0:
                os.eventfd_write(self._stop_fd, 1)

    def join(self) -> Ended:
        """Wait for the end, free everything, say how it ended. Idempotent."""
        if self._thread is not None:
            self._thread.join()
        with self._owner_lock:
            if self._stop_fd >= 0:
                self._close()
                os.close(self._stop_fd)
                os.close(self._ended_fd)
                self._stop_fd = self._ended_fd = -1
        return self._ended

    def counters(self) -> Counters:
        """Read the counters; also valid after `join`."""
        return self._tally.read()

    def touched(self) -> array[int]:
        """RECORD: file offsets of the faulted pages, unique, first-touch order."""
        return array("Q", [self._regions.offset(page) for page in list(self._touched)])

    def warnings(self) -> list[str]:
        """Take the lines gathered since the last call."""
        return self._tally.warnings()

    # --- life ------------------------------------------------------------------------------------

    def _run(self) -> None:
        filler = threading.Thread(target=self._run_filler, name="vmd-filler", daemon=True)
        with self._tally.clocked():
            if self._service.beside in (Beside.REPLAY, Beside.SEQUENTIAL):
                filler.start()
            try:
                self._serve()
            except _EndError as end:
                self._ended = end.ended
            except Exception as bug:  # it must not leave the VM waiting for ever
                self._ended = Ended(EndReason.FAILED, f"page server: {bug!r}")
            self._filler.end()
            if filler.ident is not None:
                filler.join()
        self._tell_lost_pages()
        if self._ended.reason is EndReason.FAILED:
            self._kill()
        self._close()
        os.eventfd_write(self._ended_fd, 1)

    def _run_filler(self) -> None:
        with self._tally.clocked():
            try:
                self._filler.run()
            except Exception as bug:  # speculation may fail; demand goes on
                self._tally.warn(f"replay or prefetch ends, demand goes on: {bug!r}")

    def _kill(self) -> None:
        if self._handshake.pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handshake.pidfd, signal.SIGKILL)
            self._has_exited(limits.VMM_EXIT_SECONDS)

    def _close(self) -> None:
        self._handshake.close()
        self._image.close()

    def _has_exited(self, seconds: float = 0.0) -> bool:
        return peer.has_exited(self._handshake.pidfd, seconds)

    # --- the fault thread ------------------------------------------------------------------------

    def _serve(self) -> None:
        """Serve until `_EndError`."""
        if self._handshake.pidfd < 0:  # reaped before it could be had: no poll would ever tell
            raise _EndError(EndReason.GONE)
        poll = select.poll()
        for fd in (self._handshake.uffd, self._handshake.pidfd, self._stop_fd):
            poll.register(fd, select.POLLIN)
        while True:
            ready = dict(poll.poll(self._retry_seconds * 1000 if self._parked else None))
            if self._handshake.pidfd in ready:
                raise _EndError(EndReason.GONE)
            if self._stop_fd in ready:
                raise _EndError(EndReason.STOPPED)
            if ready.get(self._handshake.uffd, 0) & select.POLLERR:
                # What poll says of a blocking userfaultfd; the flag is shared with the VMM.
                os.set_blocking(self._handshake.uffd, False)
            self._turn()

    def _turn(self) -> None:
        self._filler.calm.clear()
        try:
            now = time.monotonic()
            for page in self._drain(now):
                self._demand(page, now)
            self._retry_parked()
        finally:
            self._filler.calm.set()

    def _drain(self, now: float) -> list[int]:
        """Read the queue to its end and apply its REMOVEs: the faulted pages, in order of reading."""
        pages: list[int] = []
        with self._memory.lock:
            while True:
                data = self._read()
                for message in uffd.messages(data):
                    if message.event == uffd.EVENT_PAGEFAULT:
                        pages.append(self._fault(message.start))
                    elif message.event in (uffd.EVENT_REMOVE, uffd.EVENT_UNMAP):
                        self._memory.remove(message.start, message.end)
                    else:
                        self._unknown(message)
                if len(data) < _READ_BYTES:  # fewer than asked for: the queue is empty
                    break
        if pages and not self._parked:
            self._tally.waiting_since(now)
        return pages

    def _read(self) -> bytes:
        try:
            return os.read(self._handshake.uffd, _READ_BYTES)
        except BlockingIOError:
            return b""
        except OSError as failure:
            raise self._gone(f"userfaultfd: read: {failure.strerror}") from failure

    def _fault(self, address: int) -> int:
        self._tally.add("faults")
        page = self._regions.find(address)
        if page is None:
            raise _EndError(EndReason.FAILED, f"fault at {address:#x} is outside all regions ({self._regions})")
        if self._service.beside is Beside.RECORD:
            self._touched.setdefault(page)
        return page

    def _unknown(self, message: uffd.Message) -> None:
        if message.event == uffd.EVENT_FORK:
            os.close(message.start)  # the child's userfaultfd came with the message
        if message.event not in self._unknown_events:
            self._unknown_events.add(message.event)
            self._tally.warn(f"userfaultfd: event {message.event:#x} is not known and ignored")

    def _demand(self, page: int, read_at: float) -> None:
        if page not in self._parked and self._try(page):
            self._tally.served(time.monotonic() - read_at)
            return
        if not self._parked:
            self._retry_seconds = _RETRY_FIRST_SECONDS
        self._tally.add("parked")
        self._parked.setdefault(page, []).append(read_at)

    def _retry_parked(self) -> None:
        if self._parked:
            self._retry_seconds = min(2 * self._retry_seconds, _RETRY_LAST_SECONDS)
        for page, waiting in list(self._parked.items()):
            if self._try(page):
                del self._parked[page]
                for read_at in waiting:
                    self._tally.served(time.monotonic() - read_at)
            elif time.monotonic() - waiting[0] > limits.FAULT_UNSERVED_SECONDS_MAX:
                state = PageState(self._memory.states[page]).name.lower()
                raise self._failed(page, f"not served within {limits.FAULT_UNSERVED_SECONDS_MAX:g} s (page {state})")
        self._tally.waiting_since(min((waiting[0] for waiting in self._parked.values()), default=None))

    def _try(self, page: int) -> bool:
        """Serve a page that is waited for. False: it is refused for now, park it."""
        try:
            step = self._memory.serve(page)
        except OSError as failure:
            return self._lost(page, failure)
        return self._conclude(page, step, "install")

    def _conclude(self, page: int, step: uffd.Step, what: str) -> bool:
        match step.outcome:
            case Outcome.DONE | Outcome.PRESENT:
                return True
            case Outcome.LATER | Outcome.PARTIAL:
                return False
            case Outcome.GONE:
                raise self._gone(f"the VMM lives on without the memory that it registered, {self._regions}")
            case Outcome.EDGE if self._memory.states[page] == PageState.REMOVED:
                self._memory.wake(page)  # unmapped since: the filler had served the fault while it was parked here
                return True
            case Outcome.EDGE if self._has_exited():
                raise _EndError(EndReason.GONE)
            case Outcome.EDGE:
                raise self._failed(page, "no memory is registered with the userfaultfd there")
            case _:
                raise self._failed(page, f"{what}: {os.strerror(step.errno)}")

    def _lost(self, page: int, failure: OSError) -> bool:
        """The image cannot be read: poison the page and name it."""
        address, offset = self._regions.address(page), self._regions.offset(page)
        cause = f"page at {address:#x} (memory offset {offset}) cannot be read: {failure.strerror}"
        step = self._memory.poison(page)
        if step.errno in (errno.EINVAL, errno.ENOTTY) and step.outcome is Outcome.FATAL:
            raise _EndError(EndReason.FAILED, f"{cause}; this kernel has no UFFDIO_POISON")
        if not self._conclude(page, step, f"{cause}; poison"):
            return False
        if step.outcome is Outcome.DONE:
            self._lost_pages += 1
            if self._lost_pages <= limits.POISON_LINES_MAX:
                self._tally.warn(cause)
        return True

    def _tell_lost_pages(self) -> None:
        more = self._lost_pages - limits.POISON_LINES_MAX
        if more > 0:
            self._tally.warn(f"{more} more pages could not be read")

    def _gone(self, what: str) -> _EndError:
        """The kernel says that the address space has gone; only the pidfd says that the VMM has."""
        return (
            _EndError(EndReason.GONE)
            if self._has_exited(limits.VMM_EXIT_SECONDS)
            else _EndError(EndReason.FAILED, what)
        )

    def _failed(self, page: int, what: str) -> _EndError:
        return _EndError(EndReason.FAILED, f"fault at {self._regions.address(page):#x}: {what}")
