"""Regions against a model that is a plain list of pages."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmd.errors import HandshakeRefused
from vmd.pages.regions import HUGE_PAGE, SYSTEM_PAGE, Region, Regions

IMAGE_PAGES = 64


@dataclass(frozen=True)
class Layout:
    """Regions that do not overlap, in any order, and every page of them as (address, offset)."""

    regions: list[Region]
    page_size: int

    def pages(self) -> list[tuple[int, int]]:
        ordered = sorted(self.regions, key=lambda region: region.base)
        size = self.page_size
        return [(r.base + at, r.offset + at) for r in ordered for at in range(0, r.size, size)]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    page = draw(st.sampled_from([SYSTEM_PAGE, HUGE_PAGE]))
    sizes = draw(st.lists(st.integers(1, 8), min_size=1, max_size=5))
    gaps = draw(st.lists(st.integers(0, 3), min_size=2 * len(sizes), max_size=2 * len(sizes)))
    order = draw(st.permutations(range(len(sizes))))
    bases, at = {}, draw(st.integers(0, 1 << 30))
    for index, gap in zip(range(len(sizes)), gaps, strict=False):
        bases[index] = at + gap
        at += gap + sizes[index]
    offsets, at = {}, 0
    for index, gap in zip(order, gaps[len(sizes) :], strict=True):
        offsets[index] = at + gap
        at += gap + sizes[index]
    regions = [Region(bases[i] * page, sizes[i] * page, offsets[i] * page) for i in range(len(sizes))]
    return Layout(draw(st.permutations(regions)), page)


def built(layout: Layout) -> Regions:
    return Regions(layout.regions, layout.page_size, IMAGE_PAGES * HUGE_PAGE)


@given(layouts())
def test_every_page_is_found_by_each_of_its_bytes(layout: Layout) -> None:
    regions = built(layout)
    model = layout.pages()
    assert (regions.pages, regions.guest_bytes) == (len(model), len(model) * layout.page_size)
    for page, (address, offset) in enumerate(model):
        assert (regions.address(page), regions.offset(page)) == (address, offset)
        for inside in (0, 1, layout.page_size - 1):
            assert regions.find(address + inside) == page
            assert regions.find_offset(offset + inside) == page


@given(layouts(), st.integers(0, (1 << 31) * HUGE_PAGE), st.integers(0, IMAGE_PAGES * HUGE_PAGE))
def test_what_is_in_no_region_is_not_found(layout: Layout, address: int, offset: int) -> None:
    regions = built(layout)
    size = layout.page_size
    by_address = {at // size: page for page, (at, _) in enumerate(layout.pages())}
    by_offset = {at // size: page for page, (_, at) in enumerate(layout.pages())}
    for near in (address, *(edge + step for r in layout.regions for edge in (r.base, r.end) for step in (-1, 0, 1))):
        assert regions.find(near) == by_address.get(near // size)
    for near in (offset, *(r.offset + r.size + step for r in layout.regions for step in (-1, 0, 1))):
        assert regions.find_offset(near) == by_offset.get(near // size)


@given(layouts())
def test_an_install_up_to_the_end_of_a_region_is_contiguous(layout: Layout) -> None:
    regions = built(layout)
    for page in range(regions.pages):
        end = regions.region_end(page)
        assert page < end <= regions.pages
        last = end - 1
        assert regions.address(last) - regions.address(page) == (last - page) * layout.page_size
        assert regions.offset(last) - regions.offset(page) == (last - page) * layout.page_size
    assert len({regions.region_end(page) for page in range(regions.pages)}) == len(layout.regions)


@given(layouts(), st.data())
def test_overlaps_are_refused_and_nothing_else(layout: Layout, data: st.DataObject) -> None:
    size = layout.page_size
    limit = IMAGE_PAGES * size
    extra = Region(
        data.draw(st.integers(0, (1 << 30) + 80)) * size,
        data.draw(st.integers(1, 8)) * size,
        data.draw(st.integers(0, IMAGE_PAGES)) * size,
    )
    pages = set(range(extra.base // size, extra.end // size))
    files = set(range(extra.offset // size, (extra.offset + extra.size) // size))
    bad = (
        any(address // size in pages or offset // size in files for address, offset in layout.pages())
        or extra.offset + extra.size > limit
        or any(offset >= limit for _, offset in layout.pages())
    )
    try:
        Regions([*layout.regions, extra], size, limit)
    except HandshakeRefused:
        assert bad
    else:
        assert not bad


def test_the_map_is_shown_by_address() -> None:
    regions = Regions([Region(0x9000, 0x1000, 0), Region(0x4000, 0x2000, 0x1000)], SYSTEM_PAGE, 1 << 20)
    assert str(regions) == "0x4000-0x6000, 0x9000-0xa000"
    assert [region.base for region in regions] == [0x4000, 0x9000]
    assert len(regions) == 2


def test_a_region_may_end_with_the_address_space() -> None:
    top = Region((1 << 64) - 4096, 4096, 0)
    assert Regions([top], SYSTEM_PAGE, 4096).find((1 << 64) - 1) == 0
    with pytest.raises(HandshakeRefused, match="past 2"):
        Regions([Region((1 << 64) - 4096, 8192, 0)], SYSTEM_PAGE, 8192)
