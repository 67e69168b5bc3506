"""The inputs that the fuzzers of the Python side begin with: each is judged right, in every run of the suite."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

SEEDS = Path(__file__).parents[2] / "fuzz" / "seeds"
NEEDS_UFFD = {"handshake"}
TARGETS = ("access_log", "handshake", "memory_map", "scanner")


def seeds() -> list[object]:
    found = [path for target in TARGETS for path in sorted((SEEDS / target).iterdir())]
    marks = {target: pytest.mark.needs_uffd if target in NEEDS_UFFD else () for target in TARGETS}
    return [pytest.param(path, marks=marks[path.parent.name], id=f"{path.parent.name}-{path.name}") for path in found]


@pytest.mark.parametrize("seed", seeds())
def test_a_seed(seed: Path) -> None:
    run: Callable[[bytes], None] = import_module(f"fuzz.python.{seed.parent.name}").run
    run(seed.read_bytes())
