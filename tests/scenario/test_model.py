"""The model: a page server that keeps the rules is right in every order of steps, and one that breaks any is not.

Each broken rule is a bug that some page server has had. What is found is the shortest way to it.
"""

from __future__ import annotations

import pytest

from tests.scenario import guest
from tests.scenario.explore import HANG, Exploration, Finding, replay, walk
from tests.scenario.language import parse
from tests.scenario.model import Rules

BROKEN = [
    ("removes_first", "serve; thread 1: read 3; remove 3..4; read 3", "image, may give zero"),
    ("sticky", "serve; remove 3..4; read 3", "image, may give zero"),
    ("zeros_again", "serve; thread 1: read 3; remove 3..4; join", HANG),
    ("noted_after", "serve; thread 1: read 3; kill; adopt; join", "zero, may give image"),
    ("noted_after zeros_again", "serve; thread 1: read 3; kill; adopt; join", HANG),
    ("ring", "serve; thread 1: remove 3..4; kill; adopt; join; read 3", "image, may give zero"),
    ("gated", "serve replay [3]; remove 3..4; read 3", "image, may give zero"),
    ("parked", "serve; thread 1: read 3; remove 4..5; join", HANG),
    ("lets_go", "serve replay [3]; thread 1: remove 0..1; read 3; unmap 3..4", "fails the VM"),
    ("wakes", "serve; thread 1: read 3; kill; adopt; join", HANG),
]
"""Rules, a scenario that needs them, and what is found where they are broken."""

SOUND = [
    *dict.fromkeys(text for _, text, _ in BROKEN),
    "serve; thread 1: write 3; thread 2: remove 3..4; join; read 3",
    "thread 1: remove 3..4; serve replay [3 4]; join; read 3",
    "serve replay [3]; thread 1: read 3; thread 2: remove 3..4; kill; adopt; join",
    "serve; thread 1: remove 3..4; kill; thread 2: read 3; adopt; join; read 3",
    "kill at install; kill at adopt-wake; serve; thread 1: remove 3..4; read 3; check all",
    "kill at fill-install; serve replay [3 5]; thread 1: remove 3..4; join; read 3",
    "serve; thread 1: read 3; thread 2: remove 3..4; exit",
]


def broken(rules: str) -> Rules:
    return Rules(**dict.fromkeys(rules.split(), False))


@pytest.mark.parametrize("text", SOUND)
def test_whoever_keeps_the_rules_is_right_in_every_order(text: str) -> None:
    exploration = Exploration(parse(text))
    assert exploration.finding is None, str(exploration.finding)
    assert exploration.states > 30


@pytest.mark.parametrize(("rules", "text", "what"), BROKEN, ids=[rules for rules, _, _ in BROKEN])
def test_each_rule_is_needed(rules: str, text: str, what: str) -> None:
    finding = Exploration(parse(text), broken(rules)).finding
    assert finding is not None
    assert what in finding.what


def test_a_schedule_is_a_replay() -> None:
    finding = Exploration(parse("serve; remove 3..4; read 3"), broken("sticky")).finding
    assert finding is not None
    assert replay(finding.scenario, finding.schedule, broken("sticky")).wrong() == finding.what
    assert replay(finding.scenario, finding.schedule).wrong() is None
    assert "main: madvise\n" in str(finding)
    assert "scenario: serve; remove 3..4; read 3\n" in str(finding)


def test_a_walk_finds_what_an_exploration_finds() -> None:
    text, rules = "serve; thread 1: read 3; remove 3..4; read 3", broken("removes_first")
    findings = [walk(parse(text), seed, rules) for seed in range(300)]
    assert any(isinstance(finding, Finding) for finding in findings)
    assert not any(walk(parse(text), seed) for seed in range(300))


@pytest.mark.parametrize(
    ("text", "results", "wrong"),
    [
        ("serve; read 3; remove 3..4; read 3", ["image", "ok", "zero"], None),
        ("serve; read 3; remove 3..4; read 3", ["image", "ok", "image"], "read 3 gives image, may give zero"),
        ("serve; read 5; pread 5; pwrite 5", ["zero", "ok", "mine"], None),
        ("serve; write 3; remove 3..4; read 3", ["ok", "ok", "mine"], "read 3 gives mine, may give zero"),
        ("serve; write 3; read 3", ["ok", "zero"], "read 3 gives zero, may give mine"),
        ("serve; thread 1: read 3; remove 3..4; join", ["image", "ok"], None),
        ("serve; thread 1: read 3; remove 3..4; join", ["zero", "ok"], None),
        ("serve; thread 1: read 3; join; remove 3..4", ["zero", None, "ok"], "thread 1: read 3 gives zero"),
        # Between its two steps a removal lets writes through, and then takes them away.
        (
            "serve; thread 1: remove 3..4; thread 2: write 3; thread 2: read 3; read 3",
            ["ok", "ok", "mine", "zero"],
            None,
        ),
        (
            "serve; thread 1: remove 3..4; thread 2: read 3; thread 2: read 3",
            ["ok", "zero", "image"],
            "zero, may give image",
        ),
        ("serve; thread 1: read 3; exit", [None], None),
    ],
)
def test_what_a_guest_may_see(text: str, results: list[str | None], wrong: str | None) -> None:
    seen = {at: result for at, result in enumerate(results, start=1) if result is not None}
    said = guest.explain(parse(text), seen)
    assert said is None if wrong is None else wrong in (said or "")
