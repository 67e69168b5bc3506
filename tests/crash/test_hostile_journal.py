"""Journals that nobody of ours wrote: refused in one clear line, or served right; never a crash.

The checksum finds what a torn write or a stranger has left. It is no signature: here it is always right, unless
it is what is wrong.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import vmd_core
from hypothesis import given
from hypothesis import strategies as st

from tests.crash.conftest import Begin
from tests.crash.sample import HIGH, LOW, REGIONS, SAMPLE
from tests.fakes.vmm import eventually
from tests.support.journal_file import (
    COUNTERS,
    EVENT_FORK,
    EVENT_REMOVE,
    FIXED_BYTES,
    INCIDENT_AT,
    LATENCY_AT,
    LIVE,
    LIVE_AT,
    PAGE,
    RECORD,
    SEQUENTIAL,
    SLOTS,
    TAIL_AT,
    WORDS,
    JournalFile,
)
from vmd.pages.contract import EndReason

MOST = (1 << 64) - 1
EDGES = [0, 1, PAGE - 1, PAGE, 1 << 16, (1 << 16) + 1, 1 << 28, (1 << 28) + 1, 1 << 31, 1 << 32, 1 << 63, MOST]
TAIL_BYTES = 24 + 24 * len(REGIONS) + 8 * len(SAMPLE.offsets)


def read(data: bytes | bytearray) -> dict[str, Any] | str:
    """What the core makes of it: what the journal says, or why it is refused. Nothing else may come."""
    fd = os.memfd_create("journal")
    try:
        os.write(fd, data)
        return vmd_core.read_journal(fd)
    except ValueError as refusal:
        return str(refusal)
    finally:
        os.close(fd)


def is_clear(refusal: object) -> bool:
    """Whether it is one line that says what is wrong."""
    if not isinstance(refusal, str) or "\n" in refusal:
        return False
    return refusal.startswith(("not a journal: ", "truncated: ", "corrupt: ", "of another version: ", "no VMM "))


IMPOSSIBLE: dict[str, bytes] = {
    "page size 0": replace(SAMPLE, page_size=0).pack(),
    "page size 8192": replace(SAMPLE, page_size=8192).pack(),
    "no pages": replace(SAMPLE, regions=[(LOW, 0, 0)]).pack(),
    "pages at one address": replace(SAMPLE, regions=[(LOW, 3 * PAGE, 0), (LOW + 2 * PAGE, PAGE, 3 * PAGE)]).pack(),
    "pages of one offset": replace(SAMPLE, regions=[(LOW, 3 * PAGE, 0), (HIGH, 3 * PAGE, 2 * PAGE)]).pack(),
    "two regions that are one": replace(SAMPLE, regions=[REGIONS[0]] * 2).pack(),
    "behind the image": replace(SAMPLE, regions=[(LOW, 5 * PAGE, 4 * PAGE)]).pack(),
    "behind all addresses": replace(SAMPLE, regions=[(MOST + 1 - PAGE, 2 * PAGE, 0)]).pack(),
    "behind all offsets": replace(SAMPLE, regions=[(LOW, 2 * PAGE, MOST + 1 - PAGE)], image_bytes=MOST).pack(),
    "base between pages": replace(SAMPLE, regions=[(LOW + 8, PAGE, 0)]).pack(),
    "size between pages": replace(SAMPLE, regions=[(LOW, PAGE + 8, 0)]).pack(),
    "offset between pages": replace(SAMPLE, regions=[(LOW, PAGE, 8)]).pack(),
    "plan between pages": replace(SAMPLE, offsets=[PAGE + 1]).pack(),
    "a plan of what is no replay": replace(SAMPLE, beside=SEQUENTIAL).pack(),
    "a plan of a recording": replace(SAMPLE, beside=RECORD).pack(),
    "unknown work": SAMPLE.pack(beside=4),
    "pid of 33 bits": SAMPLE.pack(vmm_pid=1 << 32),
    "more regions": SAMPLE.pack(regions=3),
    "fewer regions": SAMPLE.pack(regions=1),
    "no regions": SAMPLE.pack(regions=0),
    "huge regions": SAMPLE.pack(regions=MOST),
    "most regions": SAMPLE.pack(regions=1 << 16),
    "more offsets": SAMPLE.pack(offsets=4),
    "huge plan": SAMPLE.pack(offsets=MOST),
    "most plan": SAMPLE.pack(offsets=1 << 28),
    "longer path": SAMPLE.pack(path=30),
    "huge path": SAMPLE.pack(path=MOST),
    "longer file": SAMPLE.pack(file_bytes=1 << 20),
    "huge guest": replace(SAMPLE, image_bytes=MOST).pack()[:TAIL_AT] + b"\xff" * PAGE,
    "magic": b"VMD" + SAMPLE.pack()[3:],
    "nothing": b"",
    "half a head": SAMPLE.pack()[: FIXED_BYTES // 2],
    "no states": SAMPLE.pack()[:-8],
}


def test_the_sample_itself_is_read() -> None:
    assert isinstance(read(SAMPLE.pack()), dict)


@pytest.mark.parametrize("data", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_is_refused(data: bytes) -> None:
    assert is_clear(read(data))


def test_lengths_are_refused_before_anything_is_made_of_that_size() -> None:
    """A file that is 2 GiB of holes says that all of it is its plan."""
    fd = os.memfd_create("journal")
    os.write(fd, SAMPLE.pack(offsets=1 << 62, file_bytes=1 << 31))
    os.ftruncate(fd, 1 << 31)
    with pytest.raises(ValueError, match="corrupt: a length beyond its bound"):
        vmd_core.read_journal(fd)
    os.close(fd)


@given(
    words=st.dictionaries(st.sampled_from(["file_bytes", *WORDS]), st.sampled_from(EDGES) | st.integers(0, MOST)),
    regions=st.none() | st.lists(st.tuples(*[st.sampled_from(EDGES) | st.integers(0, MOST)] * 3), max_size=4),
)
def test_any_words(words: dict[str, int], regions: list[tuple[int, int, int]] | None) -> None:
    journal = SAMPLE if regions is None else replace(SAMPLE, regions=regions)
    seen = read(journal.pack(**words))
    assert isinstance(seen, dict) or is_clear(seen), seen


@given(st.data())
def test_any_bytes(data: st.DataObject) -> None:
    """A change anywhere: what never changes is checked, and no other makes it unreadable."""
    journal = bytearray(SAMPLE.pack())
    at = data.draw(st.integers(0, len(journal) - 1) | st.integers(0, FIXED_BYTES) | st.integers(TAIL_AT, TAIL_AT + 99))
    journal[at] ^= data.draw(st.integers(1, 255))
    seen = read(journal)
    checked = at < FIXED_BYTES or TAIL_AT <= at < TAIL_AT + TAIL_BYTES
    assert is_clear(seen) if checked else isinstance(seen, dict)


@given(st.binary(max_size=1 << 15))
def test_any_file(data: bytes) -> None:
    assert is_clear(read(data))


# --- what changes while a VM is served, and so has no checksum -----------------------------------------------


def _junk_ring(journal: JournalFile) -> None:
    """All slots are full, of events that name nothing of this VM."""
    (low, size, _), *_ = sorted(journal.regions)
    remove = [(0, 0), (0, low), (low + size, low), (MOST, 0), (MOST, MOST), (low - 1, low), (low + 7, low + 7)]
    junk = [(EVENT_REMOVE, *ends) for ends in remove] + [(EVENT_FORK, 0, 0), (EVENT_FORK, 1, MOST), (0x12, 0, MOST)]
    dice = random.Random(1)
    known = {EVENT_REMOVE, EVENT_REMOVE + 1}
    while len(junk) < SLOTS:
        junk.append(
            (dice.choice([n for n in range(256) if n not in known]), dice.getrandbits(64), dice.getrandbits(64))
        )
    journal.ring = junk


def _junk_live(journal: JournalFile) -> None:
    journal.live = dict.fromkeys(LIVE, MOST)


def _intent(**words: int) -> Callable[[JournalFile], None]:
    def change(journal: JournalFile) -> None:
        journal.live |= {f"intent_{name}": value for name, value in words.items()}

    return change


def _junk_figures(journal: JournalFile) -> None:
    journal.max_ns = MOST
    journal.buckets = dict.fromkeys(range(976), MOST)


JUNK: dict[str, Callable[[JournalFile], None]] = {
    "ring": _junk_ring,
    "live": _junk_live,
    "intent outside": _intent(first=60, pages=5, counter=1),
    "intent beyond all numbers": _intent(first=MOST, pages=MOST, counter=1),
    "intent of an unknown counter": _intent(first=0, pages=64, counter=1 + len(COUNTERS)),
    "intent of all pages": _intent(first=0, pages=64, counter=4),
    "figures": _junk_figures,
}


@pytest.mark.needs_uffd
@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_what_is_not_checked_is_not_believed(begin: Begin, junk: Callable[[JournalFile], None]) -> None:
    world = begin()
    server = world.serve()
    assert world.vmm.verdicts([3, 4]) == ["image"] * 2
    assert world.vmm.do("remove", [4]) == ["ok"]
    world.removed.add(4)
    server.kill()
    fault = world.vmm.start("verdict", [9])
    eventually(world.vmm.blocked, "it waits")
    journal = JournalFile.parse(world.journal.read_bytes())
    junk(journal)
    world.journal.write_bytes(journal.pack())
    served = world.adopt()
    assert fault.wait() == [["image"]]
    assert world.vmm.verdicts() == [world.expected(page) for page in range(64)]
    served.counters()  # whatever they say
    world.vmm.kill()
    served.ends(EndReason.GONE)


@pytest.mark.parametrize("at", [LIVE_AT, LATENCY_AT, INCIDENT_AT])
def test_an_area_full_of_ones_is_read(at: int) -> None:
    journal = bytearray(SAMPLE.pack())
    end = {LIVE_AT: 2048, LATENCY_AT: INCIDENT_AT, INCIDENT_AT: TAIL_AT}[at]
    journal[at:end] = b"\xff" * (end - at)
    assert isinstance(read(journal), dict)
