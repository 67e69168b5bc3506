"""The pager with real Firecracker: guests notice nothing of its deaths, many share one, and none pays for the others."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import statistics
import time
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.system.conftest import NAME, SHAPE, START, Cli, Run, left_in, numbers, pager_pids
from tests.traceability.plugin import HOUSE_LINES
from vmd import limits, sandbox
from vmd.errors import RestoreFailed
from vmd.sandbox import Sandbox
from vmd.settings import Settings
from vmd.states import State

pytestmark = pytest.mark.usefixtures("template")

BURST, CLONES, DEATHS = 100, 5, 8


async def created(settings: Settings, count: int) -> list[Sandbox]:
    """So many sandboxes, made at once, which outlive whoever makes them."""
    return await asyncio.gather(
        *(sandbox.create(settings, NAME, backend="uffd", detached=True, warn=pytest.fail) for _ in range(count))
    )


@pytest.mark.seed(50)
def test_a_burst_of_creates(settings: Settings, run: Run, pytestconfig: pytest.Config) -> None:
    async def story() -> None:
        began = time.monotonic()
        boxes = await created(settings, BURST)
        total = time.monotonic() - began
        took = sorted(box.record.timings_ms["total"] for box in boxes)
        line = f"burst: {BURST} creates at once in {total:.1f} s; to the first answer p50 {took[BURST//2]:.0f} ms"
        pytestconfig.stash[HOUSE_LINES].append(line)
        print(line, took[-1])
        began = time.monotonic()
        await asyncio.gather(*(box.kill() for box in boxes))
        print(time.monotonic()-began)
    run(story())
    assert 0
