"""The regions of a VM's memory: which host addresses are which bytes of the image."""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..errors import HandshakeRefused

SYSTEM_PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20
_END = 1 << 64


@dataclass(frozen=True, slots=True)
class Region:
    """``size`` bytes at host virtual address ``base`` of the VMM, image bytes from ``offset`` on."""

    base: int
    size: int
    offset: int

    @property
    def end(self) -> int:
        """First address after the region."""
        return self.base + self.size


class Regions:
    """A VM's regions, checked, sorted by address. Pages are numbered in that order from 0."""

    def __init__(self, regions: Sequence[Region], page_size: int, image_bytes: int) -> None:
        """Raise `HandshakeRefused` for anything that interfaces.md, "Handshake" rules out."""
        self.page_size = page_size
        self.ordered = sorted(regions, key=lambda region: region.base)
        _check_page_size(page_size)
        for region in self.ordered:
            _check_region(region, page_size, image_bytes)
        _check_apart(self.ordered)
        self._bases = [region.base for region in self.ordered]
        self._by_offset = sorted(range(len(self.ordered)), key=lambda at: self.ordered[at].offset)
        self._first_pages = [0]
        for region in self.ordered:
            self._first_pages.append(self._first_pages[-1] + region.size // page_size)

    def __iter__(self) -> Iterator[Region]:
        return iter(self.ordered)

    def __len__(self) -> int:
        return len(self.ordered)

    @property
    def pages(self) -> int:
        """Pages in all regions together."""
        return self._first_pages[-1]

    @property
    def guest_bytes(self) -> int:
        """Bytes in all regions together."""
        return self.pages * self.page_size

    def find(self, address: int) -> int | None:
        """The page number that holds ``address``; None outside all regions."""
        at = bisect_right(self._bases, address) - 1
        if at < 0 or address >= self.ordered[at].end:
            return None
        return self._first_pages[at] + (address - self.ordered[at].base) // self.page_size

    def find_offset(self, offset: int) -> int | None:
        """The page number whose image bytes hold file ``offset``; None outside all regions."""
        nearest = bisect_right(self._by_offset, offset, key=lambda at: self.ordered[at].offset) - 1
        if nearest < 0:
            return None
        at = self._by_offset[nearest]
        inside = offset - self.ordered[at].offset
        return self._first_pages[at] + inside // self.page_size if inside < self.ordered[at].size else None

    def address(self, page: int) -> int:
        """Host address of a page."""
        at = bisect_right(self._first_pages, page) - 1
        return self.ordered[at].base + (page - self._first_pages[at]) * self.page_size

    def offset(self, page: int) -> int:
        """Image offset of a page, bytes."""
        at = bisect_right(self._first_pages, page) - 1
        return self.ordered[at].offset + (page - self._first_pages[at]) * self.page_size

    def region_end(self, page: int) -> int:
        """First page number after the region of a page: no install may cross it."""
        return self._first_pages[bisect_right(self._first_pages, page)]

    def __str__(self) -> str:
        """The map, for messages about an address that is in none of them."""
        return ", ".join(f"{region.base:#x}-{region.end:#x}" for region in self.ordered)


def _check_page_size(page_size: int) -> None:
    if page_size not in (SYSTEM_PAGE, HUGE_PAGE):
        raise HandshakeRefused(f"page size: expected {SYSTEM_PAGE} or {HUGE_PAGE}, got {page_size}")


def _check_region(region: Region, page_size: int, image_bytes: int) -> None:
    if region.size == 0:
        raise HandshakeRefused(f"region at {region.base:#x}: size 0")
    for name, value in (("base_host_virt_addr", region.base), ("size", region.size), ("offset", region.offset)):
        if value % page_size:
            raise HandshakeRefused(f"region at {region.base:#x}: {name} {value} is not aligned to {page_size}")
    if region.end > _END:
        raise HandshakeRefused(f"region at {region.base:#x}: base + size is past 2^64")
    if region.offset + region.size > min(image_bytes, _END):
        raise HandshakeRefused(
            f"region at {region.base:#x}: offset {region.offset} + size {region.size} is past the end of the"
            f" memory file ({image_bytes} bytes)"
        )


def _check_apart(ordered: Sequence[Region]) -> None:
    for low, high in pairwise(ordered):
        if low.end > high.base:
            raise HandshakeRefused(f"regions at {low.base:#x} and {high.base:#x} overlap in address")
    for low, high in pairwise(sorted(ordered, key=lambda region: region.offset)):
        if low.offset + low.size > high.offset:
            raise HandshakeRefused(f"regions at {low.base:#x} and {high.base:#x} overlap in the memory file")
