"""Fixtures of the contract suite: image, fake VMM, page server, for the reference and the native core alike."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from tests.fakes.vmm import FakeVmm, Span, eventually
from vmd.errors import VmdError
from vmd.pages.contract import Beside, Counters, Ended, EndReason, PageCore, Service
from vmd.pages.cores import core_name, make_core
from vmd.pages.handshake import Handshake, Listener, receive
from vmd.pages.regions import HUGE_PAGE, SYSTEM_PAGE
from vmd.pages.source import Image

HUGE_PAGES_MOST = 16


@dataclass(frozen=True)
class Memory:
    """An image file; every page that is not a hole is unlike every other, and nowhere zero for long."""

    path: Path
    pages: int
    holes: frozenset[int]
    page_size: int

    def offsets(self, pages: Sequence[int]) -> array[int]:
        """The file offsets of these pages of the file."""
        return array("Q", [page * self.page_size for page in pages])


def write_image(path: Path, pages: int, holes: Collection[int] = (), page_size: int = SYSTEM_PAGE) -> Memory:
    with path.open("wb") as file:
        file.truncate(pages * page_size)
        for page in sorted(set(range(pages)) - set(holes)):
            file.seek(page * page_size)
            file.write(hashlib.shake_128(b"page %d" % page).digest(SYSTEM_PAGE) * (page_size // SYSTEM_PAGE))
    return Memory(path, pages, frozenset(holes), page_size)


@dataclass
class Served:
    """A fake VMM and the core that serves it."""

    vmm: FakeVmm
    core: PageCore
    handshake: Handshake

    def counters(self) -> Counters:
        return self.core.counters()

    def installed(self) -> int:
        """What the counters say is resident."""
        counters = self.counters()
        return counters.demand + counters.replayed + counters.prefetched + counters.zero - counters.removed

    def adds_up(self) -> bool:
        return self.installed() == len(self.vmm.resident())

    def ends(self, reason: EndReason, seconds: float = 20.0) -> Ended:
        """Wait until the core says that it has ended, then join it. Fails when it ended otherwise."""
        eventually(lambda: is_readable(self.core.ended_fd), f"the core ends {reason}", seconds)
        ended = self.core.join()
        assert ended.reason is reason, ended
        return ended

    def finish(self) -> None:
        """Kill the VMM when it lives; its core must end with it, and the counters must have added up."""
        if self.core.ended_fd < 0 or is_readable(self.core.ended_fd):
            self.core.join()
            return
        if self.vmm.is_alive():
            eventually(self.adds_up, f"{self.counters()} adds up to {len(self.vmm.resident())} resident pages", 5.0)
        self.vmm.kill()
        self.ends(EndReason.GONE, 5.0)


def is_readable(eventfd: int) -> bool:
    """Whether an eventfd is set; leaves it set."""
    import select

    poll = select.poll()
    poll.register(eventfd, select.POLLIN)
    return bool(poll.poll(0))


@pytest.fixture(params=["reference", "native"])
def core(request: pytest.FixtureRequest) -> str:
    """The name of the core under test."""
    try:
        return core_name(request.param)
    except VmdError as missing:
        pytest.skip(f"native core not built ({missing})")


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., Memory]:
    """Write an image: ``make_image(pages, holes=(), page_size=4096)``."""
    numbers = count()

    def make(pages: int, holes: Collection[int] = (), page_size: int = SYSTEM_PAGE) -> Memory:
        return write_image(tmp_path / f"memory-{next(numbers)}", pages, holes, page_size)

    return make


Serve = Callable[..., Served]


@pytest.fixture
def serve(core: str, run_dir: Path, make_image: Callable[..., Memory]) -> Iterator[Serve]:
    """Start a fake VMM and serve it: ``serve(image, spans=whole, service=Service(), features=REMOVE)``.

    At the end each VM that still lives is checked: what was counted is what is resident. Then it is
    killed, and its core must end with it.
    """
    numbers = count()
    all_served: list[Served] = []
    with ExitStack() as stack:

        def start(
            image: Memory | int, spans: Sequence[Span] | None = None, service: Service | None = None, **keys: int
        ) -> Served:
            memory = make_image(image) if isinstance(image, int) else image
            whole = [Span(memory.pages, 0)]
            vmm = stack.enter_context(FakeVmm(memory.path, spans or whole, memory.page_size, **keys))
            handshake = shake_hands(vmm, run_dir / f"pages-{next(numbers)}.sock", memory)
            served = Served(vmm, make_core(core, handshake, Image(memory.path), service or Service()), handshake)
            served.core.start()
            all_served.append(served)
            stack.callback(served.core.join)
            stack.callback(served.core.stop)
            return served

        yield start
        for served in all_served:
            served.finish()
    all_served.clear()  # pytest keeps the fixture, and with it would keep the cores, for longer


def shake_hands(vmm: FakeVmm, path: Path, memory: Memory) -> Handshake:
    """A real handshake over a real socket."""
    listener = Listener(path)
    stop = os.eventfd(0)
    try:
        vmm.handshake(path, vmm.body(reversed(range(len(vmm.regions)))))
        handshake = receive(listener, memory.path.stat().st_size, stop, 10.0, retry=False)
        assert handshake is not None
        return handshake
    finally:
        os.close(stop)
        listener.close()


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """Room for some 2 MiB pages in the host's pool, given back at the end: how many."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    with reserved(pool, HUGE_PAGES_MOST):
        yield HUGE_PAGES_MOST


class reserved:  # noqa: N801  (reads as a verb)
    """Adds pages to the pool and takes them away again; a lock, since other runs may do the same."""

    def __init__(self, pool: Path, pages: int) -> None:
        self._pool, self._pages = pool, pages

    def __enter__(self) -> None:
        before, after = self._change(self._pages)
        if after < before + self._pages:
            self._change(before - after)
            pytest.skip(f"the host gives {after - before} of {self._pages} huge pages")

    def __exit__(self, *_: object) -> None:
        self._change(-self._pages)

    def _change(self, by: int) -> tuple[int, int]:
        with Path("/tmp/vmd-tests-hugepages.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = int(self._pool.read_text())
            self._pool.write_text(str(max(0, before + by)))
            return before, int(self._pool.read_text())


def seconds_of(act: Callable[[], object]) -> float:
    """How long ``act`` takes."""
    start = time.monotonic()
    act()
    return time.monotonic() - start


__all__ = ["HUGE_PAGE", "Beside", "Memory", "Serve", "Served", "is_readable", "seconds_of", "write_image"]
