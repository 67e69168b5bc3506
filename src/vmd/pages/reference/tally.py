"""What the reference core counts, readable while it serves."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ..contract import Counters

_COUNTED = ("faults", "demand", "replayed", "prefetched", "zero", "removed", "poisoned", "present", "parked")


class Tally:
    """Counts, latencies, CPU time and warnings of one core. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._latencies: list[float] = []  # seconds
        self._clocks: dict[int, int] = {}  # running threads: identity to CPU clock
        self._spent = 0.0  # CPU seconds of threads that have ended
        self._oldest: float | None = None
        self._warnings: list[str] = []
        self._replay = (0, False)

    def add(self, name: str, count: int = 1) -> None:
        """Count ``count`` more of ``name``, a field of `Counters`."""
        with self._lock:
            self._counts[name] += count

    def served(self, seconds: float) -> None:
        """Note that a fault was answered, ``seconds`` after its message was read."""
        with self._lock:
            self._latencies.append(seconds)

    def waiting_since(self, moment: float | None) -> None:
        """Note when the oldest fault that is not yet served was read (monotonic seconds); None: there is none."""
        with self._lock:
            self._oldest = moment

    def replay(self, pages: int, done: bool) -> None:
        """Note the size of the replay plan in pages, and whether it has been gone through completely."""
        with self._lock:
            self._replay = pages, done

    def warn(self, line: str) -> None:
        """Keep one line for `warnings`."""
        with self._lock:
            self._warnings.append(line)

    def warnings(self) -> list[str]:
        """Take the lines gathered since the last call."""
        with self._lock:
            lines, self._warnings = self._warnings, []
        return lines

    @contextmanager
    def clocked(self) -> Iterator[None]:
        """Account for the CPU time of the calling thread."""
        thread = threading.get_ident()
        with self._lock:
            self._clocks[thread] = time.pthread_getcpuclockid(thread)
        try:
            yield
        finally:
            with self._lock:  # its clock ends with it
                self._spent += time.clock_gettime(self._clocks.pop(thread))

    def read(self) -> Counters:
        """One consistent reading."""
        with self._lock:
            latencies = sorted(self._latencies)
            cpu = self._spent + sum(time.clock_gettime(clock) for clock in self._clocks.values())
            return Counters(
                **{name: self._counts[name] for name in _COUNTED},
                fault_count=len(latencies),
                fault_p50_us=_quantile(latencies, 0.50),
                fault_p99_us=_quantile(latencies, 0.99),
                fault_max_us=_quantile(latencies, 1.0),
                oldest_unserved_us=None if self._oldest is None else int((time.monotonic() - self._oldest) * 1e6),
                replay_pages=self._replay[0],
                replay_done=self._replay[1],
                cpu_us=int(cpu * 1e6),
            )


def _quantile(ordered: list[float], share: float) -> float | None:
    """The least value that ``share`` of the values do not exceed, in microseconds."""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)] * 1e6
