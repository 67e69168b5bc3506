"""What a contract test is about: an image, a fake VMM, and the core that serves it."""

from __future__ import annotations

import hashlib
import os
import select
from array import array
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.fakes.vmm import FakeVmm, Span, eventually
from vmd.pages.contract import Beside, Counters, Ended, EndReason, PageCore, Service
from vmd.pages.handshake import Handshake, Listener, receive
from vmd.pages.regions import SYSTEM_PAGE

WHOLE_BYTES = 1 << 40


@dataclass(frozen=True)
class Memory:
    """An image file. Every page that is not a hole is unlike every other and unlike zero."""

    path: Path
    pages: int
    holes: frozenset[int]
    page_size: int

    def offsets(self, pages: Iterable[int]) -> array[int]:
        """The file offsets of these pages of the file."""
        return array("Q", [page * self.page_size for page in pages])

    def replay(self, pages: Iterable[int]) -> Service:
        """A service that replays these pages of the file, in this order."""
        return Service(Beside.REPLAY, self.offsets(pages))

    def verdicts(self, pages: Iterable[int] | None = None) -> list[str]:
        """What a VM must find on these pages of the file (default: all)."""
        return ["zero" if page in self.holes else "image" for page in pages or range(self.pages)]


def write_image(path: Path, pages: int, holes: Collection[int], page_size: int) -> Memory:
    """Make an image of ``pages`` pages; ``holes`` are holes of the file too."""
    with path.open("wb") as file:
        file.truncate(pages * page_size)
        for page in sorted(set(range(pages)) - set(holes)):
            file.seek(page * page_size)
            file.write(hashlib.shake_128(b"page %d" % page).digest(SYSTEM_PAGE) * (page_size // SYSTEM_PAGE))
    return Memory(path, pages, frozenset(holes), page_size)


@dataclass
class Served:
    """A fake VMM and the core that serves it. ``racy``: see `adds_up`. ``joined``: the test saw its end."""

    memory: Memory
    vmm: FakeVmm
    core: PageCore
    racy: bool = False
    joined: bool = False

    def counters(self) -> Counters:
        return self.core.counters()

    def installed(self) -> int:
        """What the counters say is resident."""
        counters = self.counters()
        return counters.demand + counters.replayed + counters.prefetched + counters.zero - counters.removed

    def adds_up(self) -> bool:
        """Whether the counters say what is resident.

        In a racy test a page is faulted on by one thread while another removes it: the kernel lets
        installs in again just before it takes the page away, so one may vanish uncounted.
        """
        installed, resident = self.installed(), len(self.vmm.resident())
        return installed >= resident if self.racy else installed == resident

    def at_rest(self) -> Counters:
        """Wait until no fault is unserved and the counters add up (a page is counted after it is in): they."""
        eventually(
            lambda: self.counters().oldest_unserved_us is None and self.adds_up(),
            f"{self.counters()} = {self.installed()} is {len(self.vmm.resident())} resident",
            5.0,
        )
        return self.counters()

    def has_ended(self) -> bool:
        return is_readable(self.core.ended_fd)

    def ends(self, reason: EndReason, seconds: float = 20.0) -> Ended:
        """Wait until the core has ended and join it. Fails when it ended for another reason."""
        eventually(self.has_ended, f"the core ends {reason}", seconds)
        ended = self.core.join()
        self.joined = True
        assert ended.reason is reason, ended
        return ended

    def fails(self) -> str:
        """Wait until the core has failed and killed its VMM: the error."""
        ended = self.ends(EndReason.FAILED)
        assert self.vmm.wait() == -9
        assert ended.error is not None
        return ended.error

    def replayed(self) -> Counters:
        """Wait until the replay has gone through its plan: the counters."""
        eventually(lambda: self.counters().replay_done, "the replay is done")
        return self.at_rest()

    def finish(self) -> None:
        """At rest the counters add up; then the VMM is killed, and its core must end with it."""
        if self.vmm.is_alive():
            self.at_rest()
        self.vmm.kill()
        self.ends(EndReason.GONE, 5.0)


class MakeImage(Protocol):
    """Writes an image file."""

    def __call__(self, pages: int, holes: Collection[int] = (), page_size: int = SYSTEM_PAGE) -> Memory: ...


class Serve(Protocol):
    """Starts a fake VMM and a core that serves it.

    ``image`` may be a number of pages. ``spans``: its regions by address (default: one, the whole
    image). ``announce``: which of them the handshake names. ``before`` is called with the VMM and
    the handshake, when the handshake is done and nobody serves yet.
    """

    def __call__(
        self,
        image: Memory | int,
        spans: list[Span] | None = None,
        service: Service = ...,
        *,
        features: int = ...,
        announce: Collection[int] | None = None,
        before: Callable[[FakeVmm, Handshake], object] | None = None,
    ) -> Served: ...


def shake_hands(vmm: FakeVmm, path: Path, memory: Memory, announce: Collection[int] | None = None) -> Handshake:
    """A real handshake over a real socket, regions in descending order of address."""
    listener = Listener(path)
    stop = os.eventfd(0)
    try:
        named = range(len(vmm.regions)) if announce is None else announce
        vmm.handshake(path, vmm.body(sorted(named, reverse=True)))
        handshake = receive(listener, memory.path.stat().st_size, stop, 10.0, retry=False)
        assert handshake is not None
        return handshake
    finally:
        os.close(stop)
        listener.close()


def is_readable(eventfd: int) -> bool:
    """Whether an eventfd is set; leaves it set."""
    poll = select.poll()
    poll.register(eventfd, select.POLLIN)
    return bool(poll.poll(0))
