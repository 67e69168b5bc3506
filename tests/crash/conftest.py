"""What the crash tests start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import pytest

from tests.contract.world import Memory, write_image
from tests.crash.world import World
from tests.fakes.vmm import FakeVmm, Span
from vmd.errors import VmdError
from vmd.pages.cores import core_name

PAGES, HOLES = 64, frozenset({5, 40, 41})
SPANS = (Span(24, 40), Span(40, 0))
"""The region at the lower address holds the end of the image."""


class Begin(Protocol):
    """Starts a VMM that nobody serves yet; of ``spans`` of ``memory``, by default the image's (`image`)."""

    def __call__(self, spans: Sequence[Span] = ..., memory: Memory | None = ...) -> World: ...


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Memory:
    """An image with holes, which no test changes."""
    return write_image(tmp_path_factory.mktemp("image") / "memory", PAGES, HOLES, 4096)


@pytest.fixture
def begin(image: Memory, run_dir: Path) -> Iterator[Begin]:
    """Call it (`Begin`). At the end nothing is left of the VMM, its servers, its journal."""
    try:
        core_name("native")
    except VmdError as missing:
        pytest.skip(f"native core not built ({missing})")
    with ExitStack() as stack:

        def start(spans: Sequence[Span] = SPANS, memory: Memory | None = None) -> World:
            memory = memory or image
            vmm = stack.enter_context(FakeVmm(memory.path, spans))
            world = World(memory, vmm, run_dir, stack)
            for left in ("pages.sock", "journal"):
                stack.callback((run_dir / left).unlink, missing_ok=True)
            return world

        yield start
