"""A VM that is handed over to the pager when its handshake is done."""

from __future__ import annotations

import os
import select
from array import array
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Literal

import vmd_core

from ..errors import VmdError
from ..pages.contract import Counters, Ended, EndReason, Service
from ..pages.handshake import Handshake
from ..pages.journal import Journal
from ..pages.native import journal_words
from ..pages.server import PageServer, for_page_size, serve_pages
from ..pages.source import Image
from ..settings import Settings
from . import look
from .start import ensure, request

# The pager says how it ended within milliseconds of the VMM's end.
_VERDICT_SECONDS, _VERDICT_STEP_SECONDS = 1.0, 0.005


class PagerCore:
    """See `contract.PageCore`: one that works in another process, and goes on there when this one stops to look.

    The journal says all that there is to know; the pager is given it with the three descriptors.
    """

    name: Literal["native", "reference"] = "native"

    def __init__(
        self, settings: Settings, name: str, handshake: Handshake, image: Image, service: Service, journal: Journal
    ) -> None:
        self._settings = settings
        self._name = name
        self._handshake = handshake
        self._image = image
        self._journal = journal
        self._path = journal.path
        self._pidfd = os.dup(handshake.pidfd) if handshake.pidfd >= 0 else -1
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        vmd_core.write_journal(journal=journal.fd, **journal_words(handshake, image, service))

    @property
    def ended_fd(self) -> int:
        """The VMM's pidfd: with it ends the serving."""
        return self._pidfd

    def start(self) -> None:
        """Hand over. Raises `VmdError`."""
        if self._pidfd >= 0:
            fds = (self._journal.fd, self._handshake.uffd, self._pidfd, self._image.fd)
            try:
                request(self._settings, lambda control: control.serve(self._name, *fds))
            except BaseException:
                self.stop()  # nobody serves it: `join` has no end to wait for
                raise
        self._image.close()
        self._handshake.close_descriptors()
        self._journal.close()  # with it would stay the lock, should all page servers die

    def stop(self) -> None:
        """Look no longer. Returns at once; idempotent."""
        if self._stop >= 0:
            os.eventfd_write(self._stop, 1)

    def join(self) -> Ended:
        """Wait until the VMM has gone, or `stop`. Idempotent."""
        if self._stop < 0:
            return Ended(EndReason.STOPPED)
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        if self._pidfd >= 0:
            poll.register(self._pidfd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()} if self._pidfd >= 0 else {self._pidfd}
        gone = self._pidfd in ready
        ended = self._verdict() if gone else Ended(EndReason.STOPPED)
        with ExitStack() as close:
            for fd in (self._stop, self._pidfd):
                if fd >= 0:
                    close.callback(os.close, fd)
        self._stop = self._pidfd = -1
        self._handshake.connection.close()
        return ended

    def counters(self) -> Counters:
        """What the journal says."""
        with suppress(VmdError):
            return look.read(self._path).counters
        return Counters()

    def touched(self) -> array[int]:
        """Nothing is recorded in a pager."""
        return array("Q")

    def warnings(self) -> list[str]:
        """They are in the pager's log."""
        return []

    def _verdict(self) -> Ended:
        """How the pager saw it end."""
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        for _ in range(round(_VERDICT_SECONDS / _VERDICT_STEP_SECONDS)):
            with suppress(VmdError):
                view = look.read(self._path)
                if view.ended == "failed":
                    return Ended(EndReason.FAILED, view.incident)
                if view.ended is not None:
                    break
            if poll.poll(1000 * _VERDICT_STEP_SECONDS):
                break
        return Ended(EndReason.GONE)


def hand_over(
    settings: Settings,
    name: str,
    directory: Path,
    socket: Path,
    memory: Path,
    service: Service,
    page_size: int,
    warn: Callable[[str], None],
) -> PageServer:
    """Listen on ``socket`` for a VM of ``page_size``, which the pager is to serve under ``name``.

    The VM's journal is in ``directory``. Once handed over, closing what is returned leaves it served. Raises
    `VmdError`, leaving nothing.
    """

    def make(handshake: Handshake, image: Image, service: Service, journal: Journal | None) -> PagerCore:
        assert journal is not None
        return PagerCore(settings, name, handshake, image, service, journal)

    ensure(settings)  # it starts while the VMM does
    journal, plan = directory / look.JOURNAL, for_page_size(page_size, service)
    return serve_pages(socket, memory, plan, core="native", make=make, retry=False, journal=journal, warn=warn)
