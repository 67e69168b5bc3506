"""What the reference core installs beside demand: a plan of pages, in order, run by run."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from ... import limits
from ..contract import Beside, Outcome, Service
from ..regions import Regions
from .memory import Memory
from .tally import Tally

# Most that is installed before a demand fault is let in (design.md, "The page server", 4).
_PIECE_BYTES = 64 << 10
_MEMORY_CHECK_BYTES = 16 << 20
# An install that is refused because a REMOVE is pending; then the page is left to demand.
_REFUSED_TRIES = 20
_REFUSED_WAIT_SECONDS = 0.001


class Filler:
    """Goes through a plan once. Ends early, without error, when ``ending`` is set or the VM is gone."""

    def __init__(self, memory: Memory, service: Service, tally: Tally) -> None:
        self.ending = threading.Event()
        self.calm = threading.Event()  # clear while a demand fault is being served
        self.calm.set()
        self._memory = memory
        self._tally = tally
        self._replay = service.beside is Beside.REPLAY
        self._left_bytes = service.prefetch_bytes_max
        self._checked_bytes = 0
        regions = memory.regions
        self._plan = _recorded(regions, service.offsets) if self._replay else _by_offset(regions)
        if self._replay:
            tally.replay(len(self._plan), False)

    def run(self) -> None:
        """Install the plan's absent pages."""
        counter = "replayed" if self._replay else "prefetched"
        done = all(self._fill(pages, hole, counter) for pages, hole in _runs(self._memory, self._plan))
        if self._replay:
            self._tally.replay(len(self._plan), done)

    def end(self) -> None:
        """Ask it to end. Returns at once."""
        self.ending.set()
        self.calm.set()

    def _fill(self, pages: range, hole: bool, counter: str) -> bool:
        """Install one run. False: go no further."""
        if not self._replay:
            pages = self._within_bounds(pages)
        if not pages:
            return False
        try:
            data = None if hole else self._memory.read(pages.start, len(pages))
        except OSError:
            return not self.ending.is_set()  # left to demand, which says so and poisons the page
        return self._install(pages, data, "zero" if hole else counter)

    def _install(self, pages: range, data: bytes | None, counter: str) -> bool:
        page_size, tries = self._memory.page_size, _REFUSED_TRIES
        while pages:
            self.calm.wait()
            if self.ending.is_set():
                return False
            settled, step = self._memory.fill(pages, data, counter)
            self._left_bytes -= step.done
            if step.outcome is Outcome.GONE:
                return False
            if step.outcome is Outcome.FATAL:
                self._tally.warn(f"replay or prefetch ends, demand goes on: install: {os.strerror(step.errno)}")
                return False
            if step.outcome in (Outcome.LATER, Outcome.PARTIAL):
                tries -= 1
                self.ending.wait(_REFUSED_WAIT_SECONDS)
            # One page is given up, to demand, where there is no memory or no end of refusals.
            given_up = step.outcome is Outcome.EDGE or tries == 0
            settled += given_up
            tries = _REFUSED_TRIES if given_up or step.done else tries
            pages, data = pages[settled:], data and data[settled * page_size :]
        return True

    def _within_bounds(self, pages: range) -> range:
        """What of a run the sequential fallback may still install: bounded in bytes and by free memory."""
        if self._checked_bytes <= 0:
            if memory_available_percent() < limits.PREFETCH_MEMORY_FLOOR_PERCENT:
                return range(0)
            self._checked_bytes = _MEMORY_CHECK_BYTES
        self._checked_bytes -= len(pages) * self._memory.page_size
        return pages[: max(0, self._left_bytes) // self._memory.page_size]


def memory_available_percent() -> float:
    """MemAvailable of MemTotal, from /proc/meminfo, in percent."""
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kilobytes = {row[0]: int(row[1]) for row in rows}
    return 100 * kilobytes["MemAvailable:"] / kilobytes["MemTotal:"]


def _recorded(regions: Regions, offsets: Iterable[int]) -> list[int]:
    pages = (regions.find_offset(offset) for offset in offsets)
    return [page for page in pages if page is not None]


def _by_offset(regions: Regions) -> list[int]:
    ordered = sorted(regions, key=lambda region: region.offset)
    return _recorded(
        regions,
        (at for region in ordered for at in range(region.offset, region.offset + region.size, regions.page_size)),
    )


def _runs(memory: Memory, plan: list[int]) -> Iterator[tuple[range, bool]]:
    """Neighbours in the plan that are neighbours in one region and are all data or all holes, a piece at a time."""
    most = max(1, _PIECE_BYTES // memory.page_size)
    at = 0
    while at < len(plan):
        first, hole = plan[at], memory.is_hole(plan[at])
        limit = min(first + most, memory.regions.region_end(first))
        end = first + 1
        at += 1
        while end < limit and at < len(plan) and plan[at] == end and memory.is_hole(end) == hole:
            end += 1
            at += 1
        yield range(first, end), hole
