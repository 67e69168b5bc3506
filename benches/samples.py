"""Samples and what is printed of them.

A sample is one JSON line: bench, way (who was measured), metric (unit last in its name), value,
round, and the dimensions of the run. `benches.compare` reads two such files.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import vmd_core

RESULTS = Path(__file__).parent.parent / "build" / "bench"


def refuse_debug_build() -> None:
    """A debug core, or none, measures nothing: end with the reason."""
    if vmd_core.PROFILE != "release":
        raise SystemExit(f"bench: the core is a {vmd_core.PROFILE} build; run `make develop`")


class Samples:
    """The samples of one bench in one run."""

    def __init__(self, bench: str, **dimensions: Any) -> None:
        self.bench = bench
        self._dimensions = {"kernel": platform.release(), "cpus": os.cpu_count(), "core": vmd_core.VERSION} | dimensions
        self._values: dict[tuple[str, str], list[float]] = {}
        self._lines: list[str] = []

    def add(self, way: str, metric: str, value: float, *, number: int) -> None:
        """Keep one value; ``number`` is the round it was taken in."""
        self._values.setdefault((way, metric), []).append(value)
        line = {"bench": self.bench, "way": way, "metric": metric, "value": value, "round": number}
        self._lines.append(json.dumps(line | self._dimensions))

    def values(self, way: str, metric: str) -> list[float]:
        """In the order of the rounds."""
        return self._values[way, metric]

    def median(self, way: str, metric: str) -> float:
        """The median of one metric of one way."""
        return statistics.median(self.values(way, metric))

    def ratio(self, metric: str, way: str, to: str) -> float:
        """The median of the rounds' own ratios: what is slow in a round is slow for both."""
        pairs = zip(self.values(way, metric), self.values(to, metric), strict=True)
        return statistics.median(a / b for a, b in pairs)

    def save(self) -> Path:
        """Write all samples to a file of their own under ``build/bench``; returns its path."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{self.bench}-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
        path.write_text("\n".join(self._lines) + "\n")
        return path

    def table(self, ways: Iterable[str], metrics: Sequence[str]) -> str:
        """One line a way and metric: n, median, p99."""
        rows = [("way", "metric", "n", "median", "p99")]
        for way in ways:
            for metric in metrics:
                if (way, metric) in self._values:
                    values = self.values(way, metric)
                    rows.append((way, metric, str(len(values)), _short(statistics.median(values)), _short(p99(values))))
        return columns(rows)


def p99(values: Sequence[float]) -> float:
    """The smallest value that 99 % of the values do not exceed."""
    return sorted(values)[-(-99 * len(values) // 100) - 1]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words as aligned columns; the first two to the left, figures to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    pad: Callable[[int, str], str] = lambda at, word: word.ljust(widths[at]) if at < 2 else word.rjust(widths[at])  # noqa: E731
    return "\n".join("  ".join(pad(at, word) for at, word in enumerate(row)) for row in rows)


def bar(name: str, value: float, holds: bool, wanted: str) -> str:
    """One acceptance line: the figure, the bar, and whether it was met."""
    return f"{'met    ' if holds else 'NOT MET'}  {name}: {value:.3f} (bar: {wanted})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.2f}"
