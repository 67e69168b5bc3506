"""The settle detector: when a recording is over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd import limits
from vmd.recording import settled, settled_at

LEAST = 5  # ticks of 100 ms
QUIET = 3


def first_end(deltas: Sequence[int], seconds_max: float) -> tuple[int, str] | None:
    """Feed tick by tick, as a recorder does: the ticks gone when it ended, and the verdict."""
    counts = list(accumulate(deltas))
    for ticks in range(1, len(counts) + 1):
        verdict = settled(counts[:ticks], seconds_max)
        if verdict is not None:
            return ticks, verdict
    return None


@pytest.mark.seed(28)
@pytest.mark.parametrize(
    ("deltas", "end"),
    [
        ([5000, 0, 0, 0, 0, 0, 0], 7),  # quiet ticks count from 500 ms on
        ([5000, 0, 0, 0, 0, 0], None),
        ([0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0], 13),  # quiet before any activity does not count
        ([9, 9, 9, 9, 9, 9, 9, 0, 0, 0], 10),
        ([9, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0], 13),  # each fault begins the quiet run anew
        ([1] * 50 + [0] * 3, 53),
    ],
)
def test_quiet(deltas: list[int], end: int | None) -> None:
    assert first_end(deltas, 10) == (None if end is None else (end, "settled"))
    assert settled_at(list(accumulate(deltas))) == (None if end is None else end - 1)


@pytest.mark.seed(29)
def test_busy_and_silent_end_at_the_most() -> None:
    assert first_end([1] * 200, 10) == (100, "timeout")
    assert first_end([0] * 200, 10) == (100, "silent")
    assert first_end([1] * 10, 0.3) == (3, "timeout")
    assert first_end([1] * 10, 0.25) == (3, "timeout")
    assert first_end([1] * 10, 0.01) == (1, "timeout")
    assert settled_at([1] * 200, 0.3) is None
    # Quiet at the very last tick is quiet.
    assert first_end([1, 0, 0, 0, 0, 0, 0], 0.7) == (7, "settled")


def test_nothing_is_said_before_the_first_tick() -> None:
    assert settled([], 10) is None
    assert settled_at([]) is None


bursts = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 5000)), max_size=12).map(
    lambda parts: [n for busy, quiet, faults in parts for n in [faults] * busy + [0] * quiet]
)
trickles = st.lists(st.sampled_from([0, 0, 0, 0, 1]), max_size=150)
periodic = st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=9), st.integers(1, 20)).map(
    lambda shape: shape[0] * shape[1]
)
silent = st.integers(0, 150).map(lambda ticks: [0] * ticks)
traces = bursts | trickles | periodic | silent
bounds = st.sampled_from([0.05, 0.1, 0.3, 0.5, 0.7, 1.0, 2.5, 10.0, math.inf])


@given(traces, bounds)
def test_never_early_never_late(deltas: list[int], seconds_max: float) -> None:
    end = first_end(deltas, seconds_max)
    most = math.ceil(round(seconds_max * 10, 6)) if math.isfinite(seconds_max) else math.inf
    if end is None:
        assert len(deltas) < most
        return
    ticks, verdict = end
    assert ticks <= most
    if verdict == "settled":
        assert ticks * limits.SETTLE_TICK_SECONDS >= limits.SETTLE_LEAST_SECONDS - 1e-9
        assert ticks >= LEAST + QUIET - 1
        assert sum(deltas[:ticks]) > 0
        assert not any(deltas[ticks - QUIET : ticks])
    else:
        assert ticks == most
        assert (verdict == "silent") == (sum(deltas[:ticks]) == 0)


@given(traces, bounds)
def test_as_soon_as_it_is_quiet(deltas: list[int], seconds_max: float) -> None:
    """It goes on only where there was no quiet run yet."""
    end = first_end(deltas, seconds_max)
    gone = end[0] if end is not None else len(deltas)
    for last in range(LEAST + QUIET - 1, gone):
        assert any(deltas[last - QUIET : last]) or not any(deltas[:last])


@given(traces, bounds, traces)
def test_a_verdict_stays(deltas: list[int], seconds_max: float, more: list[int]) -> None:
    end = first_end(deltas, seconds_max)
    if end is not None:
        longer = list(accumulate(deltas[: end[0]] + more))
        assert settled(longer, seconds_max) == end[1]
        assert settled_at(longer, seconds_max) == (end[0] - 1 if end[1] == "settled" else None)


@given(traces, bounds, st.integers(1, 100))
def test_only_whether_there_were_faults_counts(deltas: list[int], seconds_max: float, factor: int) -> None:
    assert first_end(deltas, seconds_max) == first_end([n * factor for n in deltas], seconds_max)
