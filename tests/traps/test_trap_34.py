"""Work that is moved behind the stop of the clock is not saved: time runs from the order to the guest's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.system.conftest import SHAPE, Run
from vmd import demo
from vmd.backend import Request
from vmd.restore import STEPS, Step, restore
from vmd.settings import Settings
from vmd.tasks import finish
from vmd.template import Template
from vmd.vmm.console import Console

pytestmark = [pytest.mark.needs_kvm, pytest.mark.needs_uffd]

DELAY_MS = 150
TIMED = [step for step in STEPS if step not in (Step.SLOT, Step.READY)]
"""The steps after which a delay must show: all but the wait for a slot, which is the queue's time, and the last."""


async def delay(step: Step) -> None:
    if step in TIMED:
        await asyncio.sleep(DELAY_MS / 1000)


@pytest.fixture
def late_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest's answers come so much later."""
    ask = Console.ask

    async def ask_late(*words: Any) -> str:
        answer = await ask(*words)
        await asyncio.sleep(DELAY_MS / 1000)
        return answer

    monkeypatch.setattr(Console, "ask", ask_late)


@pytest.mark.usefixtures("late_answers")
def test_each_step_and_the_answer_count(request_for: Callable[..., Request], settings: Settings, run: Run) -> None:
    async def timings() -> dict[str, float]:
        restored = await restore(request_for("uffd"), settings, at=delay)
        await finish(restored.close())
        return restored.timings_ms

    found = run(timings())
    assert found["ready"] >= DELAY_MS
    assert found["total"] >= DELAY_MS * (len(TIMED) + 1)


@pytest.mark.usefixtures("late_answers")
@pytest.mark.parametrize("way", demo.WAYS, ids=lambda way: way.key)
def test_a_sample_of_the_demo_ends_with_a_checked_answer(
    template: Template, settings: Settings, run: Run, way: demo.Way
) -> None:
    command = demo.sweep_command(SHAPE.mem_mib, 1)
    sample = run(demo._take(settings, template, way, command, pytest.fail))
    assert sample.wrong_words == 0
    assert min(sample.load, sample.sweep) >= DELAY_MS
    assert sample.total >= sample.spawn + 2 * DELAY_MS
