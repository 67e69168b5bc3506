"""Random scenarios: lists of single operations, of which those that make no sense where they stand are left out.

So leaving out any operation leaves a scenario, and hypothesis shrinks a failing one to a few lines.
"""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st

from .language import PAGES, POINTS, Deed, KillAt, Op, Plain, Remove, Scenario, Sense, Serve, Thread, Touch, Unmap

OPS_MAX = 12
HOT = range(3, 6)
"""Pages that threads are at, so that they meet; the last is a hole of the image."""


def _deeds(pages: range) -> list[Deed]:
    touches: list[Deed] = [Touch(kind, page) for kind in ("read", "write", "pread", "pwrite") for page in pages]
    ranges = [range(at, at + n) for n in (1, 2, 4) for at in range(max(0, pages.start - n + 1), pages.stop)]
    fitting = [pages for pages in ranges if pages.stop <= PAGES]
    return [*touches, *map(Remove, fitting), *(Unmap(range(page, page + 1)) for page in pages)]


_PLANS: list[tuple[int, ...]] = [(3,), (3, 1, 2), (4, 3), tuple(range(PAGES)), tuple(reversed(range(PAGES)))]
_SERVES = [Serve(), Serve("sequential"), *(Serve("replay", plan) for plan in _PLANS)]
_THREADS: list[Op] = [Thread(number, deed) for number in (1, 2) for deed in _deeds(HOT)]
_KILLS: list[Op] = [KillAt(point, after) for point in POINTS for after in range(2)]
_LIVES: list[Op] = [
    *_deeds(range(PAGES)),
    *_THREADS,
    *([Plain("join")] * 10),
    *([Plain("check all")] * 3),
    *([Plain("exit")] * 2),
]
_DEATHS: list[Op] = [*([Plain("kill"), Plain("adopt")] * 20), *_KILLS]


def sensible(ops: Iterable[Op]) -> Scenario:
    """These operations but for those that make no sense where they stand, served and checked in the end."""
    sense, taken = Sense(), list[Op]()
    for op in ops:
        if sense.refuses(op) is None:
            sense.take(op)
            taken.append(op)
    if sense.unfinished():
        taken.append(Plain("adopt") if sense.server == "dead" else Serve())
    return Scenario(tuple(taken) if sense.exited else (*taken, Plain("check all")))


def scenarios(deaths: bool) -> st.SearchStrategy[Scenario]:
    """Scenarios, with or without deaths of the page server."""
    early = st.lists(st.sampled_from(_THREADS + _KILLS * deaths), max_size=2)
    late = st.lists(st.sampled_from(_LIVES + _DEATHS * deaths), max_size=OPS_MAX)
    return st.builds(
        lambda before, serve, after: sensible([*before, serve, *after]), early, st.sampled_from(_SERVES), late
    )
