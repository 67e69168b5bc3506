"""`python -m benches.compare A.jsonl B.jsonl`: what changed between two runs of a bench.

For each way and metric: both medians, their ratio, and how likely a difference as large as this is
when nothing has changed (Mann-Whitney U, normal approximation). Sets no pass mark.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from .samples import columns


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    before, after = read(arguments.before), read(arguments.after)
    rows = [("way", "metric", "n", "before", "after", "ratio", "p")]
    for key in sorted(before.keys() & after.keys()):
        old, new = before[key], after[key]
        a, b = statistics.median(old), statistics.median(new)
        ratio = f"{b / a:.3f}" if a else "-"
        rows.append((*key, f"{len(old)}/{len(new)}", f"{a:.2f}", f"{b:.2f}", ratio, f"{by_chance(old, new):.3f}"))
    print(columns(rows))
    return 0


def read(path: Path) -> dict[tuple[str, str], list[float]]:
    """Values by way and metric."""
    values: dict[tuple[str, str], list[float]] = {}
    for line in path.read_text().splitlines():
        sample = json.loads(line)
        values.setdefault((sample["way"], sample["metric"]), []).append(sample["value"])
    return values


def by_chance(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney U test, ties counted as half."""
    u = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    mean, deviation = len(a) * len(b) / 2, math.sqrt(len(a) * len(b) * (len(a) + len(b) + 1) / 12)
    return math.erfc(abs(u - mean) / deviation / math.sqrt(2))


if __name__ == "__main__":
    sys.exit(main())
