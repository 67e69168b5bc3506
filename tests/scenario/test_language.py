"""A scenario is its text, and what makes no sense is refused in words."""

from __future__ import annotations

import pytest
from hypothesis import given

from tests.scenario.language import Scenario, parse
from tests.scenario.strategy import scenarios


@given(scenarios(deaths=True))
def test_text_and_scenario_are_the_same(scenario: Scenario) -> None:
    assert parse(str(scenario)) == scenario
    assert parse(str(scenario).replace("; ", "\n")) == scenario


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("serve; fly 3", "'fly 3' is no operation"),
        ("serve; read 8", "page 8: there are 8"),
        ("serve; remove 4..4", "4..4 is no range"),
        ("serve; thread 4: read 1", "threads are 1 to 3"),
        ("serve; thread 1: join", "touch, remove or unmap"),
        ("serve replay [1 1]", "a page is there twice"),
        ("kill at lunch; serve", "the points are read"),
        ("read 3; serve", "read 3: the main thread would wait without a page server"),
        ("serve; kill; read 3", "read 3: the main thread would wait"),
        ("serve; kill", "nobody serves the VM at the end"),
        ("serve; serve", "it is served already"),
        ("serve; adopt", "its page server is not dead"),
        ("kill; serve", "there is no page server"),
        ("serve; exit; read 3", "the VMM has exited"),
        ("serve; unmap 3..4; read 3", "unmapped already"),
        ("serve; thread 1: unmap 3..4; read 3", "another thread is at these pages"),
        ("serve; thread 1: read 3; unmap 3..4", "another thread is at these pages"),
    ],
)
def test_nonsense_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why.replace("[", r"\[")):
        parse(text)


def test_what_is_joined_may_be_unmapped() -> None:
    parse("serve; thread 1: read 3; thread 2: remove 3..4; join; unmap 3..4; check all")
