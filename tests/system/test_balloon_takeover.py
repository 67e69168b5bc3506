"""A guest gives up memory and takes it back while it sweeps, and its pager is killed all the while: nothing stale."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import pytest

from tests.system.conftest import Run, pager_pids
from tests.system.test_balloon import EACH_SECOND, LONG_SWEEP, TAKEN, TAKEN_MIB, RequestFor, ask, check, settle
from tests.system.test_balloon import restored_from as restored
from vmd.settings import Settings
from vmd.template import Template

KILLS = 12
SEED = 4


async def ready_pager(settings: Settings) -> int:
    """The pid of the pager, once a standby waits for its death."""
    async with asyncio.timeout(20):
        while "standby" not in (pids := pager_pids(settings)):
            await asyncio.sleep(0.001)
    return pids["pager"]


async def kill_again_and_again(settings: Settings, dice: random.Random) -> None:
    for _ in range(KILLS):
        pager = await ready_pager(settings)
        await asyncio.sleep(dice.uniform(0, 0.05))  # any moment is as good as any other: that is the test
        os.kill(pager, signal.SIGKILL)


@pytest.mark.seed(13)
def test_pages_go_and_come_while_the_pager_dies(
    request_for: RequestFor, template: Template, settings: Settings, run: Run
) -> None:
    dice = random.Random(SEED)

    async def story() -> None:
        request = request_for(access_log=template.access_log, detached=True)
        async with restored(request, settings) as vm:
            await ask(vm, EACH_SECOND)
            killing = asyncio.ensure_future(kill_again_and_again(settings, dice))
            rounds = 0
            while not killing.done():
                sweeping = asyncio.ensure_future(ask(vm, LONG_SWEEP))
                await vm.vmm.set_balloon(TAKEN_MIB)
                await asyncio.sleep(dice.uniform(0, 0.2))
                await vm.vmm.set_balloon(0)
                assert (await sweeping)["wrong"] == 0
                rounds += 1
            await killing
            await vm.vmm.set_balloon(TAKEN_MIB)
            await settle(vm, TAKEN)
            await vm.vmm.set_balloon(0)
            figures = await settle(vm, 0)
            assert figures["inflated"] >= TAKEN
            await check(vm)
            assert vm.pages is not None
            assert vm.pages.stats()["vmm_pid"] == vm.vmm.pid

    run(story())
