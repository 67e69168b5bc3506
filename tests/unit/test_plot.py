"""The picture of a recording: well-formed, bounded, in proportion."""

from __future__ import annotations

import random
import re
from array import array
from itertools import chain
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.plot import plot_recording
from vmd.recording import Recording

MIB = 1 << 20
SVG = "{http://www.w3.org/2000/svg}"


def texts(recording: Recording) -> list[str]:
    root = ElementTree.fromstring(plot_recording(recording))
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def strokes(recording: Recording) -> list[tuple[int, int, int]]:
    """``(column, row from the top, rows)`` of each stroke."""
    root = ElementTree.fromstring(plot_recording(recording))
    (path,) = (element for element in root.iter(f"{SVG}path") if element.get("class") == "pages")
    found = re.findall(r"M(\d+) (\d+)v(\d+)", path.get("d", ""))
    return [(int(column), int(row), int(rows)) for column, row, rows in found]


def test_it_says_what_it_shows() -> None:
    recording = Recording(
        4096,
        array("Q", [0, 4096, 64 * MIB]),
        snapshot="a<1>&b",
        memory=f"{128 * MIB}:1:ff",
        ended="settled",
        faults_per_tick=(2, 1, 0, 0, 0, 0, 0),
    )
    words = texts(recording)
    assert "3 pages in the order of first touch" in words
    assert "12 KiB of 128 MiB, pages of 4 KiB, 2 runs, ended: settled" in words
    assert "snapshot a<1>&b" in words
    assert "settled at 0.7 s" in words
    assert {"address (MiB)", "rank of first touch (pages)", "time since the start (s)", "faults / 100 ms"} <= {*words}
    assert "128" in words


def test_without_ticks_there_is_no_second_panel() -> None:
    assert "faults / 100 ms" not in texts(Recording(4096, array("Q", [0])))


def test_what_did_not_settle_says_how_it_ended() -> None:
    assert "timeout at 0.3 s" in texts(Recording(4096, array("Q", [0]), ended="timeout", faults_per_tick=(1, 1, 1)))


def test_pages_stand_where_they_lie() -> None:
    recording = Recording(4096, array("Q", [0, 32 * MIB, 64 * MIB - 4096]), memory=f"{64 * MIB}:1:ff")
    assert strokes(recording) == [(0, 179, 1), (1, 89, 1), (2, 0, 1)]


def test_huge_pages_are_as_tall_as_they_are() -> None:
    assert strokes(Recording(2 * MIB, array("Q", [2 * MIB, 0]), memory=f"{4 * MIB}:1:ff")) == [(0, 0, 90), (1, 89, 91)]


@pytest.mark.parametrize("pages", [38_000, 1 << 20])
def test_it_stays_small(pages: int) -> None:
    numbers = random.Random(1).sample(range(1 << 20), pages)
    offsets = array("Q", [number * 4096 for number in numbers])
    drawn = plot_recording(Recording(4096, offsets, faults_per_tick=tuple(range(8192))))
    assert len(drawn) < 300_000
    ElementTree.fromstring(drawn)


@given(
    st.lists(st.integers(0, (1 << 52) - 1), unique=True, max_size=40),
    st.sampled_from([4096, 2 * MIB]),
    st.lists(st.integers(0, 10**7), max_size=30),
    st.none() | st.text("<>&\"'a:\n\0\x1b\ud800\N{SNOWMAN}0123456789", max_size=200),
)
def test_anything_is_drawn_inside_its_frame(
    numbers: list[int], page_size: int, ticks: list[int], words: str | None
) -> None:
    offsets = array("Q", [number * page_size % (1 << 62) // page_size * page_size for number in numbers])
    recording = Recording(page_size, offsets, words, words, words, faults_per_tick=tuple(ticks))
    assert all(row >= 0 and rows > 0 and row + rows <= 180 for _, row, rows in strokes(recording))
    columns = list(chain.from_iterable(stroke[:1] for stroke in strokes(recording)))
    assert columns == sorted(columns)
