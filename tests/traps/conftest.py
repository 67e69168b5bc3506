"""Fixtures of the trap tests: those of the other suites, and a page server that takes another's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests.contract.conftest import core, huge_pages, make_image, serve
from tests.fakes.vmm import FakeVmm
from tests.hostile.conftest import server
from tests.system.conftest import built, request_for, run, settings, template
from tests.traps.takeover import Adopt, Adopter

__all__ = ["built", "core", "huge_pages", "make_image", "request_for", "run", "serve", "server", "settings", "template"]


@pytest.fixture
def journal(run_dir: Path) -> Iterator[Path]:
    """Where a journal goes. Who serves last removes it; a test that fails need not say so twice."""
    path = run_dir / "journal"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def adopt(tmp_path: Path) -> Iterator[Adopt]:
    """Take over a VM by its journal and wait until its pages are served again."""
    numbers = count()
    with ExitStack() as stack:

        def start(vmm: FakeVmm, journal: Path) -> Adopter:
            directory = tmp_path / f"adopter-{next(numbers)}"
            directory.mkdir()
            adopter = Adopter(directory, vmm.pid, journal)
            stack.callback(adopter.close)
            adopter.wait_ready()
            return adopter

        yield start
