"""The regions of a handshake, as numbers: any of them, held against the rules as the interface words them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from vmd.errors import HandshakeRefused
from vmd.pages.regions import HUGE_PAGE, SYSTEM_PAGE, Region, Regions

from . import _line

END = 1 << 64
_REGIONS_MAX = 6
_NEAR = (0, 1, 8, 4095, 4096, HUGE_PAGE)


def run(data: bytes) -> None:
    """Take the maps that the rules allow and no others; and then each page is where it says it is."""
    numbers = _Numbers(data)
    page_size = numbers.choose((SYSTEM_PAGE, HUGE_PAGE, numbers.take()))
    image_bytes = numbers.take()
    regions = [(numbers.take(), numbers.take(), numbers.take()) for _ in range(numbers.byte() % (_REGIONS_MAX + 1))]
    built = None
    try:
        built = Regions([Region(*each) for each in regions], page_size, image_bytes)
    except HandshakeRefused as refused:
        _line.check(str(refused), 300)
    assert (built is not None) == is_good(regions, page_size, image_bytes)
    if built is not None:
        _check_pages(built, sorted(regions))


def is_good(regions: Sequence[tuple[int, ...]], page_size: int, image_bytes: int) -> bool:
    """The rules of a memory map; that there must be a region is the handshake's to check."""
    if page_size not in (SYSTEM_PAGE, HUGE_PAGE):
        return False
    for base, size, offset in regions:
        if size <= 0 or base % page_size or size % page_size or offset % page_size or min(base, offset) < 0:
            return False
        if base + size > END or offset + size > min(END, image_bytes):
            return False
    return not any(_overlap(a, b) for a, b in combinations(regions, 2))


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    in_address = max(a[0], b[0]) < min(a[0] + a[1], b[0] + b[1])
    in_file = max(a[2], b[2]) < min(a[2] + a[1], b[2] + b[1])
    return in_address or in_file


def _check_pages(built: Regions, regions: list[tuple[int, ...]]) -> None:
    first = 0
    for base, size, offset in regions:
        pages = size // built.page_size
        for page in {0, 1 % pages, pages // 2, pages - 1}:
            at = page * built.page_size
            for byte in (0, built.page_size - 1):
                assert built.find(base + at + byte) == built.find_offset(offset + at + byte) == first + page
            assert (built.address(first + page), built.offset(first + page)) == (base + at, offset + at)
            assert built.region_end(first + page) == first + pages
        first += pages
    assert (built.pages, built.guest_bytes) == (first, first * built.page_size)
    for edge in (edge for base, size, _ in regions for edge in (base - 1, base + size)):
        inside = any(base <= edge < base + size for base, size, _ in regions)
        assert (built.find(edge) is not None) == inside
    for edge in (edge for _, size, offset in regions for edge in (offset - 1, offset + size)):
        inside = any(offset <= edge < offset + size for _, size, offset in regions)
        assert (built.find_offset(edge) is not None) == inside


class _Numbers:
    """Numbers out of an input: small ones, round ones, ones near the end of the address space, any ones."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._last = 0

    def byte(self) -> int:
        """The next byte; 0 behind the end."""
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def choose(self, values: Sequence[int]) -> int:
        """One of ``values``."""
        return values[self.byte() % len(values)]

    def take(self) -> int:
        """The next number, of any size up to 2^72."""
        form = self.byte()
        unit = (1, SYSTEM_PAGE, HUGE_PAGE, 1 << 30)[form & 3]
        kind = form >> 2 & 7
        if kind < 4:
            self._last = self.byte() * unit
        elif kind == 4:
            self._last += self.byte() * unit  # beside the number before
        elif kind == 5:
            self._last = END - self.byte() * unit
        elif kind == 6:
            self._last = int.from_bytes(bytes(self.byte() for _ in range(9)), "big")
        else:
            self._last = max(0, self._last - self.choose(_NEAR))
        return self._last
