"""Restores at once: bounded over all processes of a host, given back by whatever ends their holder."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vmd.settings import Settings
from vmd.slots import slot

HOLD = """
import asyncio
from vmd.settings import Settings
from vmd.slots import slot

async def hold():
    async with slot(Settings.read()):
        print("held", flush=True)
        await asyncio.sleep(60)

asyncio.run(hold())
"""


@pytest.fixture
def settings(run_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("VMD_MAX_CONCURRENT_RESTORES", "2")
    return Settings.read()


@pytest.fixture
def holder(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds one of the two slots."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


async def holding(settings: Settings, inside: list[str], name: str, until: asyncio.Event) -> None:
    async with slot(settings):
        inside.append(name)
        await until.wait()


def test_processes_share_the_slots(settings: Settings, holder: subprocess.Popen[str]) -> None:
    async def story() -> None:
        inside: list[str] = []
        until = asyncio.Event()
        tasks = [asyncio.create_task(holding(settings, inside, name, until)) for name in "ab"]
        await asyncio.sleep(0.2)
        assert inside == ["a"]
        holder.kill()
        while len(inside) < 2:
            await asyncio.sleep(0.01)
        until.set()
        await asyncio.gather(*tasks)
        assert inside == ["a", "b"]

    asyncio.run(asyncio.wait_for(story(), 10))


def test_who_waits_for_another_process_can_be_cancelled_at_once(
    settings: Settings, holder: subprocess.Popen[str]
) -> None:
    async def story() -> float:
        one = replace(settings, concurrent_restores_max=1)
        waiting = [asyncio.create_task(holding(one, [], "x", asyncio.Event())) for _ in range(3)]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        for task in waiting:
            task.cancel()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        return time.monotonic() - began

    assert asyncio.run(story()) < 1


def test_a_slot_is_used_again_and_first_come_is_first_served(settings: Settings) -> None:
    async def story() -> list[int]:
        served = []

        async def one(number: int) -> None:
            async with slot(settings):
                served.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*(one(number) for number in range(20)))
        return served

    assert asyncio.run(story()) == list(range(20))
