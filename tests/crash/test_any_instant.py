"""SIGKILL at instants that nobody has chosen, one server after the other, under a VM that goes on all the time.

``CRASH_KILLS``: how many kills (default 36); the seed of a run that fails is in its name.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest

from tests.contract.world import Memory, write_image
from tests.crash.conftest import Begin
from tests.crash.world import World
from tests.fakes.vmm import Job, Span

pytestmark = pytest.mark.needs_uffd

KILLS = int(os.environ.get("CRASH_KILLS", "36"))
IN_A_ROW = 6
PAGES, THREADS, ROUNDS = 512, 4, 8
SECONDS_MAX = 0.01
"""From the word that a server begins to its death. Half of them come to serving."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Memory:
    """Larger than that of the matrix, with runs of holes."""
    holes = {page for page in range(PAGES) if page % 31 < 5}
    return write_image(tmp_path_factory.mktemp("image") / "memory", PAGES, holes, 4096)


@pytest.mark.parametrize("seed", range(-(-KILLS // IN_A_ROW)))
def test_any_instant(begin: Begin, seed: int) -> None:
    dice = random.Random(seed)
    world = begin([Span(PAGES // 2, PAGES // 2), Span(PAGES // 2, 0)])
    job = world.vmm.start("churn", range(PAGES), threads=THREADS, rounds=ROUNDS, split=True)
    plan = dice.sample(range(PAGES), PAGES // 2)
    beside: list[dict[str, Any]] = [
        {"beside": "nothing"},
        {"beside": "replay", "offsets": world.offsets(plan)},
        {"beside": "sequential", "prefetch_bytes_max": PAGES // 2 * 4096},
    ]
    server = world.serve(**beside[seed % len(beside)])
    server.hear("serving")
    for _ in range(IN_A_ROW - 1):
        time.sleep(dice.uniform(0, SECONDS_MAX))
        server.kill()
        server = world.go_on()
    time.sleep(dice.uniform(0, SECONDS_MAX))
    server.kill()
    assert job.results() is None, "it was at it all the time"
    assert_right(world, job)


def assert_right(world: World, job: Job) -> None:
    served = world.adopt()
    left = holds(job)
    counters = served.at_rest()
    assert counters.takeovers <= world.takeovers  # who died before it touched anything did not count itself
    assert world.vmm.do("content", range(PAGES)) == left
    served.at_rest()
    served.finish()


def holds(job: Job) -> Sequence[str]:
    """What each page must hold in the end, after nothing was wrong on the way."""
    threads = job.wait()
    wrong = {said for thread in threads for said in thread if "instead" in said}
    assert not wrong
    last = [thread[-PAGES // THREADS :] for thread in threads]
    return [last[page % THREADS][page // THREADS] for page in range(PAGES)]
