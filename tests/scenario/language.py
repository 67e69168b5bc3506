"""The language of scenarios: what a guest does, what becomes of its page server, and in which order.

A scenario is lines (or one line with ``;``), done one after the other by the guest's main thread; ``thread N:``
hands one to another thread of the guest and goes on. The VM always has `PAGES` pages; those in `HOLES` are holes
of its image. Ranges are half open: ``2..4`` is pages 2 and 3::

    serve                       the page server starts; before it, whatever waits for it waits
    serve replay [3 1 2]        ... and replays these pages; or: serve sequential
    read 3     write 5          the guest touches a page
    pwrite 3   pread 5          so does the kernel in its place: pwrite(2) from the page, pread(2) into it
    remove 2..6                 madvise(MADV_DONTNEED), of which the page server gets a REMOVE
    unmap 7..8                  munmap
    thread 1: read 3            beside what follows; a thread does its lines in order
    join                        wait for all threads
    check all                   join, then look at each page, whole
    kill                        the page server dies now, between any two of its steps
    adopt                       another one takes the VM over, and goes on with what the first one did beside
    kill at install+1           the next page server to start dies the second time that it comes to this point,
                                and another one adopts its VM at once
    exit                        the VMM ends, and its page server must too

``parse(str(scenario)) == scenario``: what a failing test prints can be pasted back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

PAGES = 8
HOLES = frozenset({5, 6})
THREADS = range(1, 4)
POINTS = (
    *("read", "apply", "clear", "install", "note", "fill-install", "fill-note"),
    *("adopt-apply", "adopt-wake", "adopted"),
)
"""Where a page server can be made to die; those from ``adopt-apply`` on are only come to by one that adopts."""

Beside = Literal["nothing", "replay", "sequential"]
TouchKind = Literal["read", "write", "pread", "pwrite"]


@dataclass(frozen=True)
class Touch:
    """Touch the first word of a page. ``write`` and ``pread`` put the guest's own word there."""

    kind: TouchKind
    page: int

    def __str__(self) -> str:
        return f"{self.kind} {self.page}"

    @property
    def pages(self) -> range:
        """The one page, as `Remove` and `Unmap` name theirs."""
        return range(self.page, self.page + 1)

    @property
    def writes(self) -> bool:
        """Whether the guest's own word is on the page afterwards."""
        return self.kind in ("write", "pread")


@dataclass(frozen=True)
class Remove:
    """Give pages back."""

    pages: range

    def __str__(self) -> str:
        return f"remove {self.pages.start}..{self.pages.stop}"


@dataclass(frozen=True)
class Unmap:
    """Take pages out of the address space."""

    pages: range

    def __str__(self) -> str:
        return f"unmap {self.pages.start}..{self.pages.stop}"


Deed = Touch | Remove | Unmap
"""What any thread of the guest can do."""


@dataclass(frozen=True)
class Thread:
    """Have another thread do it."""

    number: int
    deed: Deed

    def __str__(self) -> str:
        return f"thread {self.number}: {self.deed}"


@dataclass(frozen=True)
class Serve:
    """The first page server starts; what it does beside demand."""

    beside: Beside = "nothing"
    replay: tuple[int, ...] = ()

    def __str__(self) -> str:
        beside = {"nothing": "", "sequential": " sequential", "replay": f" replay [{_words(self.replay)}]"}
        return f"serve{beside[self.beside]}"

    @property
    def plan(self) -> tuple[int, ...]:
        """The pages that it installs beside demand, in order."""
        return tuple(range(PAGES)) if self.beside == "sequential" else self.replay


@dataclass(frozen=True)
class KillAt:
    """The next page server to start dies when it comes to ``point`` once more than ``after`` times."""

    point: str
    after: int = 0

    def __str__(self) -> str:
        return f"kill at {self.point}" + (f"+{self.after}" if self.after else "")


@dataclass(frozen=True)
class Plain:
    """An operation without an operand."""

    words: Literal["join", "check all", "kill", "adopt", "exit"]

    def __str__(self) -> str:
        return self.words


Op = Deed | Thread | Serve | KillAt | Plain


@dataclass(frozen=True)
class Scenario:
    """Operations in order. Raises ValueError when they have no meaning together (`Sense`)."""

    ops: tuple[Op, ...]

    def __post_init__(self) -> None:
        sense = Sense()
        for op in self.ops:
            if refused := sense.refuses(op):
                raise ValueError(f"{op}: {refused}, in: {self}")
            sense.take(op)
        if unfinished := sense.unfinished():
            raise ValueError(f"{unfinished}, in: {self}")

    def __str__(self) -> str:
        return "; ".join(map(str, self.ops))

    def has(self, word: str) -> bool:
        """Whether an operation begins with this word."""
        return any(str(op).split()[0] == word for op in self.ops)


@dataclass
class Sense:
    """Which operation can follow: none of which the main thread would never return, none that is a guest's own crash.

    So while no page server lives the main thread only hands out work; nobody touches what is, or is being,
    unmapped; and in the end somebody serves whoever may still wait.
    """

    server: Literal["none", "alive", "dead"] = "none"
    exited: bool = False
    unmapped: set[int] = field(default_factory=set)
    running: dict[type[Deed], set[int]] = field(default_factory=dict)  # pages of the threads' deeds since the last join

    def refuses(self, op: Op) -> str | None:
        """Why ``op`` cannot come next; None: it can."""
        if self.exited:
            return "the VMM has exited"
        match op:
            case Touch() | Remove() | Unmap() | Plain("join" | "check all") if self.server != "alive":
                return "the main thread would wait without a page server"
            case Touch() | Remove() | Unmap() | Thread():
                return self._refuses_deed(op.deed if isinstance(op, Thread) else op)
            case Serve() if self.server != "none":
                return "it is served already"
            case Plain("adopt") if self.server != "dead":
                return "its page server is not dead"
            case Plain("kill") if self.server != "alive":
                return "there is no page server"
        return None

    def _refuses_deed(self, deed: Deed) -> str | None:
        beside = self.running.values() if isinstance(deed, Unmap) else [self.running.get(Unmap, set())]
        if self.unmapped & set(deed.pages):
            return "unmapped already"
        return "another thread is at these pages" if any(pages & set(deed.pages) for pages in beside) else None

    def take(self, op: Op) -> None:
        """It comes next."""
        match op:
            case Thread():
                self.running.setdefault(type(op.deed), set()).update(op.deed.pages)
            case Unmap():
                self.unmapped.update(op.pages)
            case Plain("join" | "check all"):
                self.unmapped.update(self.running.get(Unmap, ()))
                self.running.clear()
            case Serve() | Plain("adopt"):
                self.server = "alive"
            case Plain("kill"):
                self.server = "dead"
            case Plain("exit"):
                self.exited = True

    def unfinished(self) -> str | None:
        """Why it cannot end here; None: it can."""
        return None if self.exited or self.server == "alive" else "nobody serves the VM at the end"


# --- text ----------------------------------------------------------------------------------------


def parse(text: str) -> Scenario:
    """A scenario from its text. Raises ValueError and names the line."""
    lines = (line.strip() for line in re.split(r"[;\n]", text))
    return Scenario(tuple(_parse_op(line) for line in lines if line))


_FORMS: tuple[tuple[str, Callable[..., Op]], ...] = (
    (r"(read|write|pread|pwrite) (\d+)", lambda kind, page: Touch(kind, _page(page))),
    (r"remove (\d+)\.\.(\d+)", lambda *bounds: Remove(_range(*bounds))),
    (r"unmap (\d+)\.\.(\d+)", lambda *bounds: Unmap(_range(*bounds))),
    (r"thread (\d+): (.*)", lambda number, text: _thread(int(number), _parse_op(text))),
    (r"serve(?:| (sequential)| replay \[((?:\d+ ?)*)\])", lambda *beside: _serve(*beside)),
    (r"kill at ([a-z-]+?)(?:\+(\d+))?", lambda point, after: _kill_at(point, int(after or 0))),
    (r"(join|check all|kill|adopt|exit)", lambda words: Plain(words)),
)


def _parse_op(line: str) -> Op:
    for form, make in _FORMS:
        if found := re.fullmatch(form, line):
            return make(*found.groups())
    raise ValueError(f"{line!r} is no operation")


def _page(word: str) -> int:
    if int(word) >= PAGES:
        raise ValueError(f"page {word}: there are {PAGES}")
    return int(word)


def _range(start: str, stop: str) -> range:
    if not int(start) < int(stop) <= PAGES:
        raise ValueError(f"{start}..{stop} is no range of pages")
    return range(int(start), int(stop))


def _thread(number: int, op: Op) -> Thread:
    if number not in THREADS or not isinstance(op, Deed):
        raise ValueError(f"thread {number}: {op}: threads are 1 to {THREADS[-1]}, and touch, remove or unmap")
    return Thread(number, op)


def _serve(sequential: str | None, replay: str | None) -> Serve:
    pages = tuple(map(_page, replay.split())) if replay is not None else ()
    if len(set(pages)) != len(pages):
        raise ValueError(f"replay [{replay}]: a page is there twice")
    return Serve("sequential") if sequential else Serve("nothing" if replay is None else "replay", pages)


def _kill_at(point: str, after: int) -> KillAt:
    if point not in POINTS:
        raise ValueError(f"kill at {point}: the points are {_words(POINTS)}")
    return KillAt(point, after)


def _words(items: Iterable[object]) -> str:
    return " ".join(map(str, items))
