"""Random scenarios over the model and real cores. What fails is shrunk, and printed as a text to play again.

``--hypothesis-seed=N`` makes the same scenarios again; a text is played again with ``python -m tests.scenario``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
from hypothesis import given, settings

from tests.scenario.drivers import Stage
from tests.scenario.explore import walk
from tests.scenario.language import POINTS, Scenario
from tests.scenario.strategy import scenarios

MODEL_EXAMPLES = 5000
EXAMPLES = {"native": 5000, "reference": 500}

pytestmark = pytest.mark.timeout(600)  # to shrink what hangs takes its time


def machine(check: Callable[[Scenario], None], examples: int, deaths: bool) -> None:
    """Check so many random scenarios."""
    quiet = settings(max_examples=examples, deadline=None, database=None)
    quiet(given(scenarios(deaths))(check))()


def test_random_scenarios_over_the_model() -> None:
    def check(scenario: Scenario) -> None:
        finding = walk(scenario, zlib.crc32(str(scenario).encode()))  # the text alone says which order
        assert finding is None, str(finding)

    machine(check, MODEL_EXAMPLES, deaths=True)


@pytest.mark.needs_uffd
@pytest.mark.seed(11, 12, 13)
def test_random_scenarios_over_a_core(stage: Stage) -> None:
    mortal = stage.core == "native"
    machine(stage.run, EXAMPLES[stage.core], deaths=mortal)
    assert stage.deaths.keys() == (set(POINTS) if mortal else set())
