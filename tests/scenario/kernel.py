"""The kernel's rules for a userfaultfd, as far as a page server has to know them; each was seen on a real one.

- A touch of a missing page queues a fault and sleeps until its page is woken; then it looks again.
- ``read`` gives faults before events that were there earlier, and no message twice.
- ``madvise(DONTNEED)`` queues a REMOVE and sleeps until that is read. Only then are installs let in again, and only
  then does it take the pages away: these are two moments, and a page may be installed between them.
- ``munmap`` takes the pages away first, then queues its event and sleeps until that is read.
- An install is refused (EAGAIN) from the queueing of such an event until its sleeper has woken; else ENOENT where
  nothing is mapped, EEXIST where a page is; else the page is in and who waits for it is woken.
- Who reads may be gone with what was read: the kernel keeps no copy.

Guest threads are generators: each ``yield`` is a moment at which everybody else may go on, and may give a condition
for its own going on (`Until`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Literal

from .guest import SEEN
from .language import HOLES, PAGES, Deed, Remove, Touch, Unmap

Until = Callable[[], bool]
Steps = Generator[str | Until, None, str]
"""Steps of a thread and, in the end, its result. A ``str`` names the moment."""

Outcome = Literal["done", "present", "later", "edge", "gone"]


@dataclass
class Fault:
    """A thread waits for a page."""

    thread: int
    page: int


@dataclass
class Event:
    """A REMOVE or UNMAP; ``read`` wakes who sent it."""

    pages: range
    read: bool = False


def image(page: int) -> str:
    """What the image has for a page."""
    return "zero" if page in HOLES else "image"


@dataclass
class Kernel:
    """One VM's memory and its userfaultfd."""

    contents: list[str | None] = field(default_factory=lambda: [None] * PAGES)  # None: missing; "-": unmapped
    sleeping: dict[int, int] = field(default_factory=dict)  # thread: page, whether its fault was read or not
    faults: list[Fault] = field(default_factory=list)  # to be read
    events: list[Event] = field(default_factory=list)  # to be read
    changing: int = 0  # events whose senders have not gone on
    exited: bool = False

    # --- the page server's side ------------------------------------------------------------------

    def readable(self) -> bool:
        """Whether there is a message."""
        return bool(self.faults or self.events)

    def read(self) -> list[Fault | Event]:
        """All messages."""
        messages: list[Fault | Event] = [*self.faults, *self.events]
        for event in self.events:
            event.read = True
        self.faults, self.events = [], []
        return messages

    def install(self, page: int, content: str) -> Outcome:
        """UFFDIO_COPY or UFFDIO_ZEROPAGE."""
        if self.exited:
            return "gone"
        if self.changing:
            return "later"
        if self.contents[page] == "-":
            return "edge"
        if self.contents[page] is not None:
            return "present"
        self.contents[page] = content
        self.wake(page)
        return "done"

    def wake(self, page: int) -> None:
        """UFFDIO_WAKE: who waits for the page looks again, and his fault, if it is not read yet, is no more."""
        self.sleeping = {thread: other for thread, other in self.sleeping.items() if other != page}
        self.faults = [fault for fault in self.faults if fault.page != page]

    # --- the guest's side ------------------------------------------------------------------------

    def do(self, thread: int, deed: Deed) -> Steps:
        """One thread's steps through what a scenario has it do."""
        match deed:
            case Touch():
                return self._touch(thread, deed)
            case Remove(pages):
                return self._remove(pages)
            case Unmap(pages):
                return self._unmap(pages)

    def reach(self, thread: int, page: int) -> Steps:
        """Come to a page that is there: its content."""
        while True:
            yield f"touch {page}"
            if (content := self.contents[page]) is not None:
                return content
            self.faults.append(Fault(thread, page))
            self.sleeping[thread] = page
            yield lambda: thread not in self.sleeping

    def _touch(self, thread: int, touch: Touch) -> Steps:
        content = yield from self.reach(thread, touch.page)
        if not touch.writes:
            return SEEN[content]
        self.contents[touch.page] = content.rstrip("*") + "*"
        return "ok"

    def _remove(self, pages: range) -> Steps:
        yield "madvise"
        event = self._send(pages)
        yield lambda: event.read
        self.changing -= 1
        yield "installs are let in again"
        self._take_away(pages, None)
        return "ok"

    def _unmap(self, pages: range) -> Steps:
        yield "munmap"
        self._take_away(pages, "-")
        event = self._send(pages)
        yield lambda: event.read
        self.changing -= 1
        return "ok"

    def _send(self, pages: range) -> Event:
        event = Event(pages)
        self.events.append(event)
        self.changing += 1
        return event

    def _take_away(self, pages: range, left: str | None) -> None:
        for page in pages:
            if self.contents[page] != "-":
                self.contents[page] = left
