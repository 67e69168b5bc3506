"""A guest that is asked for more memory than it can spare breaks by its own hand: ours gives what it can, and lives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest

from tests.system.conftest import SHAPE, Run, numbers
from vmd.backend import Request
from vmd.restore import Restored, restore
from vmd.settings import Settings
from vmd.tasks import finish

pytestmark = [pytest.mark.needs_kvm, pytest.mark.needs_uffd]


async def ask(restored: Restored, line: str) -> dict[str, int]:
    return numbers(await restored.ask(line, 60))


async def until_held(restored: Restored, pages: int) -> None:
    async with asyncio.timeout(60):
        while (await ask(restored, "balloon"))["held"] != pages:
            pass


def test_a_balloon_that_is_asked_for_everything(
    core: Literal["native", "reference"], request_for: Callable[..., Request], settings: Settings, run: Run
) -> None:
    async def story() -> None:
        restored = await restore(request_for("uffd"), replace(settings, core=core), warn=pytest.fail)
        try:
            heap = (await ask(restored, "info"))["pages"]
            assert (await ask(restored, "balloon"))["held"] == 0  # it is there, and nobody blows it up unasked
            await restored.vmm.set_balloon(SHAPE.mem_mib)
            await until_held(restored, heap)
            checked = await ask(restored, "check")  # the guest's own code too
            assert (checked["skipped"], checked["wrong"]) == (heap, 0)
            await restored.vmm.set_balloon(0)
            await until_held(restored, 0)
            checked = await ask(restored, "check")
            assert (checked["zero_pages"], checked["wrong"]) == (heap, 0)
        finally:
            await finish(restored.close())

    run(story())
