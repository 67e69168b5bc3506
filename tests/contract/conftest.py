"""Fixtures of the contract suite, for the reference and the native core alike."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests.contract.world import MakeImage, Memory, Serve, Served, shake_hands, write_image
from tests.fakes.vmm import FakeVmm, Span
from vmd.errors import VmdError
from vmd.pages import uffd
from vmd.pages.contract import Service
from vmd.pages.cores import core_name, make_core
from vmd.pages.handshake import Handshake
from vmd.pages.regions import SYSTEM_PAGE
from vmd.pages.source import Image

HUGE_PAGES = 12
_POOL = Path("/proc/sys/vm/nr_hugepages")
_POOL_LOCK = Path("/tmp/vmd-tests-hugepages.lock")


@pytest.fixture(params=["reference", "native"])
def core(request: pytest.FixtureRequest) -> str:
    """The name of the core under test."""
    try:
        return core_name(request.param)
    except VmdError as missing:
        pytest.skip(f"native core not built ({missing})")


@pytest.fixture
def make_image(tmp_path: Path) -> MakeImage:
    """Write an image: ``make_image(pages, holes=(), page_size=4096)``."""
    numbers = count()

    def make(pages: int, holes: Collection[int] = (), page_size: int = SYSTEM_PAGE) -> Memory:
        return write_image(tmp_path / f"memory-{next(numbers)}", pages, holes, page_size)

    return make


@pytest.fixture
def serve(core: str, run_dir: Path, make_image: MakeImage) -> Iterator[Serve]:
    """Start a fake VMM and serve it (`Serve`).

    Each VM that is still served at the end must add up and then end as it should; of those that a
    test has joined nothing is asked. The watch of every test sees to it that nothing is left.
    """
    numbers = count()
    all_served: list[Served] = []
    with ExitStack() as stack:

        def start(
            image: Memory | int,
            spans: list[Span] | None = None,
            service: Service = Service(),  # noqa: B008  (frozen)
            *,
            features: int = uffd.FEATURE_EVENT_REMOVE,
            announce: Collection[int] | None = None,
            before: Callable[[FakeVmm, Handshake], object] | None = None,
        ) -> Served:
            memory = make_image(image) if isinstance(image, int) else image
            vmm = stack.enter_context(
                FakeVmm(memory.path, spans or [Span(memory.pages, 0)], memory.page_size, features)
            )
            handshake = shake_hands(vmm, run_dir / f"{next(numbers)}.sock", memory, announce)
            source = Image(memory.path)
            with ExitStack() as until_owned:
                until_owned.callback(handshake.close)
                until_owned.callback(source.close)
                if before is not None:
                    before(vmm, handshake)
                served = Served(memory, vmm, make_core(core, handshake, source, service))
                until_owned.pop_all()
            stack.callback(served.core.join)
            stack.callback(served.core.stop)
            served.core.start()
            all_served.append(served)
            return served

        yield start
        for served in all_served:
            if not served.joined:
                served.finish()
    all_served.clear()  # pytest keeps the fixture, and with it would keep the cores, for longer


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Room for `HUGE_PAGES` pages of 2 MiB in the host's pool, given back at the end."""
    before = _change_pool(HUGE_PAGES)
    gained = int(_POOL.read_text()) - before
    try:
        if gained < HUGE_PAGES:
            pytest.skip(f"the host gives {gained} of {HUGE_PAGES} huge pages")
        yield
    finally:
        _change_pool(-gained)


def _change_pool(by: int) -> int:
    """Change the pool's size, under a lock, since other runs may do the same. Returns the old size."""
    with _POOL_LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(_POOL.read_text())
        _POOL.write_text(str(max(0, before + by)))
        return before
