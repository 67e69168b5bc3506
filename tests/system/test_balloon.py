"""Memory that a guest gives up and takes back under our page server: real REMOVE events, and every word checked.

The guest checks each page that comes back: what is not zero there is `stale`, and stays wrong in every later check.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.support import guest_memory
from tests.system.conftest import SHAPE, Run, evict, numbers
from vmd.backend import Request
from vmd.pages.server import PageServer
from vmd.restore import Restored, restore
from vmd.settings import Settings
from vmd.tasks import finish
from vmd.template import Template

SPAN = 4096
TAKEN_MIB = 8
TAKEN = TAKEN_MIB * 256
EACH_SECOND = f"balloon next={SPAN - 1} stride=2"
"""Single pages of the span: each is a REMOVE of its own, in the middle of runs that are installed together."""

LONG_SWEEP = f"sweep pages=15000 span={SPAN} order=random write=20 compute=100000"
"""1.5 s at least: long enough for the balloon to do its work in between."""

RequestFor = Callable[..., Request]
Thaw = Callable[[], AbstractAsyncContextManager[Restored]]


@pytest.fixture(params=["native-replay", "native-sequential", "native-nothing", "reference-replay"])
def thaw(request: pytest.FixtureRequest, request_for: RequestFor, template: Template, settings: Settings) -> Thaw:
    """Restores the template under a page server of this kind, which does this beside demand faults."""
    core, beside = str(request.param).split("-")
    log = template.access_log if beside == "replay" else None
    chosen = replace(settings, core=core, prefetch_enabled=beside != "nothing")
    return lambda: restored_from(request_for(access_log=log), chosen)


@asynccontextmanager
async def restored_from(request: Request, settings: Settings) -> AsyncIterator[Restored]:
    restored = await restore(request, settings, warn=pytest.fail)
    try:
        yield restored
    finally:
        await finish(restored.close())


async def ask(restored: Restored, line: str) -> dict[str, int]:
    return numbers(await restored.ask(line, 60))


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not look():
            await asyncio.sleep(0.001)


async def settle(restored: Restored, pages: int) -> dict[str, int]:
    """The balloon's figures once it holds that many pages."""
    async with asyncio.timeout(20):
        while (figures := await ask(restored, "balloon"))["held"] != pages:
            pass
    assert figures["stale"] == 0
    return figures


def count(restored: Restored, key: str) -> int:
    assert isinstance(restored.pages, PageServer)
    return int(getattr(restored.pages.counters(), key))


def has_counted(restored: Restored, key: str, exactly: int) -> bool:
    return count(restored, key) == exactly


async def accounts_agree(restored: Restored) -> None:
    """The page server counts what is resident in the VMM; the last page may not be noted yet."""

    def agree() -> bool:
        came = sum(count(restored, key) for key in ("demand", "replayed", "prefetched", "zero"))
        there = guest_memory.resident(restored.vmm.pid, SHAPE.mem_mib << 20)
        return came - count(restored, "removed") == there

    await until(agree)


async def check(restored: Restored) -> dict[str, int]:
    checked = await ask(restored, "check")
    assert checked["wrong"] == 0
    return checked


@pytest.mark.seed(13)
def test_pages_go_and_come_while_the_guest_sweeps(thaw: Thaw, run: Run) -> None:
    async def story() -> None:
        async with thaw() as restored:
            await ask(restored, EACH_SECOND)
            assert (await ask(restored, f"sweep pages={SPAN} span={SPAN}"))["wrong"] == 0
            sweeping = asyncio.ensure_future(ask(restored, LONG_SWEEP))
            await restored.vmm.set_balloon(TAKEN_MIB)
            await until(partial(has_counted, restored, "removed", TAKEN))
            zeros = count(restored, "zero")
            assert not sweeping.done()
            await restored.vmm.set_balloon(0)
            await until(lambda: count(restored, "zero") >= zeros + TAKEN)
            assert not sweeping.done()
            swept = await sweeping
            assert swept["wrong"] == 0
            assert swept["skipped"] > 0
            figures = await settle(restored, 0)
            assert (figures["inflated"], figures["deflated"]) == (TAKEN, TAKEN)
            await check(restored)
            assert count(restored, "poisoned") == 0

    run(story())


@pytest.mark.seed(13)
def test_pages_that_go_before_they_came_are_zeros_too(thaw: Thaw, run: Run) -> None:
    async def story() -> None:
        async with thaw() as restored:
            await ask(restored, EACH_SECOND)
            await restored.vmm.set_balloon(TAKEN_MIB)
            await settle(restored, TAKEN)
            assert (await ask(restored, f"sweep pages={SPAN} span={SPAN}"))["skipped"] == TAKEN
            await restored.vmm.set_balloon(0)
            await settle(restored, 0)
            checked = await check(restored)
            assert checked["zero_pages"] >= TAKEN
            await accounts_agree(restored)

    run(story())


@pytest.mark.seed(13)
@pytest.mark.parametrize("core", ["native", "reference"])
def test_pages_go_while_replay_brings_them(
    core: str, request_for: RequestFor, template: Template, settings: Settings, tmp_path: Path, run: Run
) -> None:
    offsets = list(range(0, template.snapshot.memory_bytes, 4096))
    random.Random(1).shuffle(offsets)  # page by page, and from the disk: it takes longer than the balloon
    log = tmp_path / "access.log"
    log.write_text("".join(f"{offset}\n" for offset in offsets))

    async def story() -> None:
        evict(template.snapshot.memory)
        async with restored_from(request_for(access_log=log), replace(settings, core=core)) as restored:
            await restored.vmm.set_balloon(4 * TAKEN_MIB)
            await settle(restored, 4 * TAKEN)
            assert 0 < count(restored, "removed") < 4 * TAKEN  # some had come, some had not
            await restored.vmm.set_balloon(0)
            await settle(restored, 0)
            await check(restored)

    run(story())


@pytest.mark.seed(49)
def test_again_and_again(thaw: Thaw, run: Run) -> None:
    async def story() -> None:
        async with thaw() as restored:
            before = (await check(restored))["zero_pages"]
            for round_ in range(1, 4):
                await restored.vmm.set_balloon(TAKEN_MIB)
                await settle(restored, TAKEN)
                await until(partial(has_counted, restored, "removed", round_ * TAKEN))
                await accounts_agree(restored)
                await restored.vmm.set_balloon(0)
                await settle(restored, 0)
                await ask(restored, f"sweep span={SPAN} write=50")
            assert (await check(restored))["zero_pages"] >= before
            await accounts_agree(restored)

    run(story())
