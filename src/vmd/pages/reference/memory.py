"""A VM's memory as the reference core knows it: the state of each page, and what moves a page.

One lock. Held around *read the queue and apply its REMOVEs* and around *look at the state,
install, note it*: so between the filler's look and its note no REMOVE is read, and before a
REMOVE is read the kernel refuses installs with EAGAIN. Without it a page could be removed and
then filled with stale bytes, with return code 0. Nobody waits for the kernel under it: installs
are refused rather than delayed, and the queue is read without blocking.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from ... import limits
from .. import uffd
from ..contract import Injection, Outcome, PageState
from ..regions import HUGE_PAGE, Regions
from ..source import Extents, Image
from ..uffd import Step
from .tally import Tally


@dataclass
class _Order:
    """What is left of an injection: installs that still pass, installs that still end as it says."""

    injection: Injection
    passing: int
    left: int


class Installer:
    """Puts bytes into guest memory through a userfaultfd, or ends as a test ordered by an `Injection`."""

    def __init__(self, fd: int, injections: Sequence[Injection]) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._orders = [_Order(injection, injection.after, injection.count) for injection in injections]

    def copy(self, address: int, data: bytes) -> Step:
        """Install ``data`` (whole pages) and wake."""
        source = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0  # `data` lives through the call
        return self._injected("copy") or uffd.copy(self._fd, address, source, len(data))

    def zero(self, address: int, size: int) -> Step:
        """Install zeros and wake; 4 KiB pages only."""
        return self._injected("zero") or uffd.zero(self._fd, address, size)

    def poison(self, address: int, size: int) -> Step:
        """Make each touch of the range a SIGBUS."""
        return self._injected("poison") or uffd.poison(self._fd, address, size)

    def wake(self, address: int, size: int) -> None:
        """Let those who wait in the range try again."""
        uffd.wake(self._fd, address, size)

    def _injected(self, op: str) -> Step | None:
        with self._lock:
            order = next((order for order in self._orders if order.injection.op == op and order.left > 0), None)
            if order is None:
                return None
            if order.passing > 0:
                order.passing -= 1
                return None
            order.left -= 1
            return Step(order.injection.outcome, 0, order.injection.errno)


class Memory:
    """The pages of one VM: their states, their contents in the image, and the installs that join the two."""

    def __init__(self, installer: Installer, regions: Regions, image: Image, tally: Tally) -> None:
        self.lock = threading.Lock()
        self.regions = regions
        self.page_size = regions.page_size
        self.states = bytearray(regions.pages)  # PageState of each page; all ABSENT
        self._installer = installer
        self._image = image
        self._extents = Extents(image.data_extents())
        self._tally = tally

    def is_hole(self, page: int) -> bool:
        """Whether the image has a hole there: known zeros."""
        return self._extents.is_hole(self.regions.offset(page), self.page_size)

    def read(self, page: int, pages: int = 1) -> bytes:
        """The image's bytes of neighbouring pages. Raises OSError when they cannot be had."""
        size = pages * self.page_size
        data = os.pread(self._image.fd, size, self.regions.offset(page))
        if len(data) != size:
            raise OSError(errno.EIO, "the file ends before it")
        return data

    def remove(self, start: int, end: int) -> None:
        """Note that the VM gave back ``[start, end)``. The caller holds the lock."""
        for region in self.regions:
            low, high = max(start, region.base), min(end, region.end)
            for address in range(low, high, self.page_size):
                page = self.regions.find(address)
                assert page is not None
                if self.states[page] == PageState.INSTALLED:
                    self._tally.add("removed")
                self.states[page] = PageState.REMOVED

    # --- demand ----------------------------------------------------------------------------------

    def serve(self, page: int) -> Step:
        """Install a page that is waited for. Raises OSError when the image cannot be read.

        Only the fault thread applies REMOVEs, and it is the caller: while it reads the image
        without the lock, the filler can install the page (EEXIST says so), nothing else.
        """
        with self.lock:
            if self.states[page] == PageState.POISONED:
                return self._poison(page)
            if self.states[page] != PageState.ABSENT or self.is_hole(page):
                return self._install(range(page, page + 1), None, "zero")
        data = self._read_stubbornly(page)
        with self.lock:
            return self._install(range(page, page + 1), data, "demand")

    def wake(self, page: int) -> None:
        """Let those who wait for a page try again."""
        self._installer.wake(self.regions.address(page), self.page_size)

    def poison(self, page: int) -> Step:
        """Make a page that cannot be read fail at its touch: neither wrong bytes nor silence."""
        with self.lock:
            step = self._poison(page)
            if step.outcome is Outcome.DONE:
                self._tally.add("poisoned")
            return step

    def _poison(self, page: int) -> Step:
        address = self.regions.address(page)
        step = self._installer.poison(address, self.page_size)
        if step.outcome is Outcome.PRESENT:  # poisoned for another waiter, or there after all
            self._tally.add("present")
            self._installer.wake(address, self.page_size)
            if self.states[page] == PageState.ABSENT:
                self.states[page] = PageState.INSTALLED
        if step.outcome is Outcome.DONE:
            self.states[page] = PageState.POISONED
        return step

    def _read_stubbornly(self, page: int) -> bytes:
        for _ in range(limits.IMAGE_READ_TRIES - 1):
            try:
                return self.read(page)
            except OSError:
                continue
        return self.read(page)

    # --- beside ----------------------------------------------------------------------------------

    def fill(self, pages: range, data: bytes | None, counter: str) -> tuple[int, Step]:
        """Install the first stretch of pages that are still absent (``data`` None: zeros).

        Returns how many pages of ``pages`` are settled by it, and what happened.
        """
        with self.lock:
            first = next((page for page in pages if self.states[page] == PageState.ABSENT), pages.stop)
            after = next((page for page in range(first, pages.stop) if self.states[page] != PageState.ABSENT), None)
            stretch = range(first, pages.stop if after is None else after)
            if not stretch:
                return len(pages), Step(Outcome.DONE, 0)
            if data is not None:
                at = (first - pages.start) * self.page_size
                data = data[at : at + len(stretch) * self.page_size]
            step = self._install(stretch, data, counter)
            settled = 1 if step.outcome is Outcome.PRESENT else step.done // self.page_size
            return first - pages.start + settled, step

    def _install(self, pages: range, data: bytes | None, counter: str) -> Step:
        """Install and then note it: noted before, a death in between leaves a page that is only ever woken."""
        address, size = self.regions.address(pages.start), len(pages) * self.page_size
        if data is None and self.page_size == HUGE_PAGE:
            data = bytes(size)  # ZEROPAGE is EINVAL on hugetlb
        step = self._installer.zero(address, size) if data is None else self._installer.copy(address, data)
        done = pages[: step.done // self.page_size]
        self._tally.add(counter, len(done))
        if step.outcome is Outcome.PRESENT:
            done = pages[:1]
            self._tally.add("present")
            self._installer.wake(address, self.page_size)
        for page in done:
            self.states[page] = PageState.INSTALLED
        return step
