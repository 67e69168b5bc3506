"""A page server for one VM: its socket, its handshake, its core."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from .. import limits
from ..errors import HandshakeRefused, PagesFailed, VmdError
from . import peer
from .contract import Ended, EndReason, PageCore, Service
from .cores import core_name, make_core
from .handshake import Handshake, Listener, receive
from .journal import Journal
from .life import Server, settle
from .regions import Regions
from .source import Image
from .stats import ServedVm

MakeCore = Callable[[Handshake, Image, Service, Journal | None], PageCore]


class PageServer(Server):
    """Serves the first VMM that connects to ``listener`` with a good handshake, in this process.

    ``service`` makes the `Service` once the guest's page size is known (bytes). ``retry``: a peer
    that vanishes before its handshake is complete is warned of and another one awaited; without
    it the handshake fails. ``accept_seconds`` bounds the wait for a good handshake. ``journal``:
    what another process can go on from, should this one die. ``make``: makes another core than ``core`` names.

    The page server owns ``listener``, ``image`` and ``journal``, from the moment that its construction has succeeded.
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
        journal: Journal | None = None,
        make: MakeCore | None = None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        super().__init__(warn, journal)
        self.core_name = core_name(core)
        self._listener = listener
        self._image = image
        self._service = service
        self._retry = retry
        self._accept_seconds = accept_seconds
        self._make = make
        self._handshake: Handshake | None = None
        self._plan: Service | None = None

    def replay(self) -> Service | None:
        """What it does beside demand faults; None before the handshake."""
        return self._plan

    @property
    def regions(self) -> Regions | None:
        """The VM's memory map; None before the handshake."""
        return self._handshake.regions if self._handshake else None

    def _served(self) -> ServedVm | None:
        if self._handshake is None:
            return None
        regions, plan = self._handshake.regions, self._plan
        return ServedVm(
            self._handshake.vmm_pid, regions.page_size, regions.guest_bytes, len(regions),
            plan.skipped if plan else 0, plan.refused if plan else None,
        )  # fmt: skip

    def _close_outlet(self) -> None:
        self._listener.close()

    def _close_inputs(self) -> None:
        self._listener.close()
        self._image.close()
        if self._journal is not None:
            self._journal.close()

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
            self._plan = self._service(handshake.regions.page_size)
            make = self._make or partial(make_core, self.core_name)
            core = make(handshake, self._image, self._plan, self._journal)
            self._start_core(core)
            return core
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


def for_page_size(page_size: int, service: Service) -> Callable[[int], Service]:
    """``service`` for a guest of this page size (bytes); a guest of another one is refused."""

    def checked(found: int) -> Service:
        if found != page_size:
            raise HandshakeRefused(f"page size: expected the template's {page_size}, got {found}")
        return service

    return checked


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


def serve_pages(
    socket: Path,
    memory: Path,
    service: Callable[[int], Service],
    *,
    owner: tuple[int, int] | None = None,
    core: str | None = None,
    retry: bool = True,
    accept_seconds: float | None = None,
    journal: Path | None = None,
    make: MakeCore | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> PageServer:
    """Open ``memory``, listen on ``socket``, start a `PageServer`. Raises `VmdError`, leaving nothing."""
    core = core_name(core)
    with ExitStack() as undo:
        image = Image(memory)
        undo.callback(image.close)
        listener = Listener(socket, owner=owner)
        undo.callback(listener.close)
        kept = None if journal is None else Journal.create(journal, image, core, warn)
        if kept is not None:
            undo.callback(kept.remove)
        try:
            server = PageServer(
                listener,
                image,
                service,
                core=core,
                retry=retry,
                accept_seconds=accept_seconds,
                journal=kept,
                make=make,
                warn=warn,
            )
        except OSError as failure:
            raise VmdError(f"page server: {failure.strerror}") from failure
        server.start()
        undo.pop_all()
    return server
