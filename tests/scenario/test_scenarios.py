"""Scenarios written by hand, each for one thing that went wrong somewhere; over the model and over real cores."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest

from tests.scenario import drivers
from tests.scenario.drivers import Failure, Stage
from tests.scenario.explore import walk
from tests.scenario.language import PAGES, KillAt, parse
from vmd.pages.contract import Outcome, PageState
from vmd.pages.reference import memory
from vmd.pages.uffd import Step

WALKS = 50
ROUNDS = 20
"""Of each scenario with threads, on a real core: what meets in them meets in another way each time."""
ROUNDS_MAX = 1000
"""By then each death that a scenario asks for has come."""

LIVES = {
    "every page": "serve; check all",
    "every page, replayed": "serve replay [7 6 5 4 3 2 1 0]; check all",
    "every page, in sequence": "serve sequential; check all",
    "touched in every way": "serve; read 0; write 1; pread 2; pwrite 3; pread 5; pwrite 5; read 1; pwrite 2; check all",
    "removed before any touch": "serve; remove 2..6; check all",
    "removed and removed again": "serve; read 3; remove 3..4; read 3; remove 3..4; write 3; remove 0..8; check all",
    "written and removed": "serve; write 3; read 3; remove 3..4; read 3; write 3; check all",
    "removed while nobody serves": "thread 1: remove 2..4; thread 2: read 3; serve replay [3 2 1]; check all",
    "touched while nobody serves": "thread 1: read 3; thread 2: pwrite 3; thread 3: write 5; serve; join; check all",
    "fault and REMOVE in one read": "thread 1: read 3; thread 2: remove 3..4; serve; join; read 3; check all",
    "a fault beside another page's REMOVE": "serve; thread 1: remove 4..5; read 3; thread 2: remove 5..6; read 4; join",
    "one page, three threads": "serve; thread 1: read 3; thread 2: pwrite 3; thread 3: write 3; read 3; check all",
    "faults race REMOVEs": (
        "serve; thread 1: remove 3..5; thread 2: read 3; thread 2: read 4; thread 3: write 3; thread 1: remove 3..4;"
        "thread 3: pread 4; read 3; read 4; check all"
    ),
    "the filler races REMOVEs": (
        "serve replay [3 4 5 6]; thread 1: remove 5..6; thread 2: remove 3..5; thread 3: read 6; read 4; check all"
    ),
    "a sequential fill races REMOVEs": "serve sequential; thread 1: remove 6..8; thread 2: remove 1..3; check all",
    "unmapped": "serve; read 2; unmap 2..4; read 1; read 4; check all",
    "unmapped before the filler comes": "thread 1: unmap 4..6; serve replay [3 4 5 6]; check all",
    "unmapped in the filler's way": "serve sequential; thread 1: unmap 2..3; unmap 6..7; check all",
    "unmapped with its fault parked": (
        "serve replay [0 1 2 3 4 5]; thread 1: remove 0..1; thread 2: remove 1..2; thread 3: remove 6..7;"
        "read 5; unmap 5..6"
    ),
    "exit": "serve; read 3; exit",
    "exit in the middle of all": "serve sequential; thread 1: read 3; thread 2: remove 2..6; thread 3: write 7; exit",
}
DEATHS = {
    "between two faults": "serve; read 3; kill; adopt; read 3; read 4; check all",
    "with a fault waiting": "serve; kill; thread 1: read 3; thread 2: write 5; adopt; join; check all",
    "with a REMOVE waiting": "serve; read 3; kill; thread 1: remove 3..5; adopt; join; check all",
    "removed before, adopted, filled": "serve; read 3; remove 3..5; kill; adopt; check all",
    "in the middle of all": (
        "serve sequential; thread 1: read 3; thread 2: remove 2..5; write 6; kill; adopt; check all"
    ),
    "twice": "serve; thread 1: remove 2..4; kill; adopt; thread 2: read 3; kill; adopt; check all",
    "the VMM is gone too": "serve; thread 1: read 3; kill; exit",
    **{
        f"at {point}": f"kill at {point}; serve; thread 1: read 3; remove 2..6; check all"
        for point in ("read", "apply")
    },
    "at clear": "kill at clear+1; serve; thread 1: read 3; remove 2..6; check all",
    "at install": "kill at install+1; serve; write 3; read 4; remove 3..5; check all",
    "at note": "kill at note+1; serve; write 3; read 4; remove 3..5; check all",
    "at fill-install": "kill at fill-install+1; serve replay [3 1 5]; thread 1: remove 1..4; check all",
    "noted, not counted, unmapped": "kill at fill-note; serve replay [0 1 2 3 4 5 6 7]; unmap 3..4; check all",
    "at fill-note": "kill at fill-note; serve sequential; thread 1: remove 1..4; check all",
    **{
        f"again at {point}": (
            f"kill at read+1; kill at {point}; serve replay [7]; write 3; thread 1: remove 3..5; read 2; check all"
        )
        for point in ("adopt-apply", "adopt-wake", "adopted", "read")
    },
    "twice at fill-install": "kill at fill-install; kill at fill-install; serve sequential; remove 1..2; check all",
}


@pytest.mark.parametrize("text", [*LIVES.values(), *DEATHS.values()], ids=[*LIVES, *DEATHS])
def test_over_the_model(text: str) -> None:
    for seed in range(WALKS):
        finding = walk(parse(text), seed)
        assert finding is None, str(finding)


@pytest.mark.needs_uffd
@pytest.mark.seed(11, 12, 13)
@pytest.mark.parametrize("text", LIVES.values(), ids=LIVES)
def test_over_a_core(stage: Stage, text: str) -> None:
    stage.be_patient(rounds=ROUNDS if "thread" in text else 1)
    stage.run(parse(text))


@pytest.mark.needs_uffd
@pytest.mark.seed(12, 13)
@pytest.mark.parametrize("text", DEATHS.values(), ids=DEATHS)
@pytest.mark.parametrize("stage", ["native"], indirect=True)
def test_deaths_over_the_native_core(stage: Stage, text: str) -> None:
    scenario = parse(text)
    due = Counter(op.point for op in scenario.ops if isinstance(op, KillAt))
    for done in count():
        stage.run(scenario)
        if done >= ROUNDS and stage.deaths >= due:
            break
        assert done < ROUNDS_MAX, (
            f"a guest that is faster than the filler keeps it alive, but not always: {stage.deaths}"
        )


# --- a core that is wrong is found out ------------------------------------------------------------


def forgets_removes(self: memory.Memory, start: int, end: int) -> None:
    """As if no REMOVE had been read."""


def makes_absent(self: memory.Memory, start: int, end: int) -> None:
    """Removed, but not for good."""
    for page in range(PAGES):
        if start <= self.regions.address(page) < end:
            self.states[page] = PageState.ABSENT


def drops(self: memory.Memory, page: int) -> Step:
    """A fault is said to be served, and is not."""
    return Step(Outcome.DONE, 0)


@pytest.mark.needs_uffd
@pytest.mark.parametrize("stage", ["reference"], indirect=True)
@pytest.mark.parametrize(
    ("method", "sabotage", "text", "what"),
    [
        ("remove", forgets_removes, "serve; remove 3..4; read 3", "read 3 gives image, may give zero"),
        ("remove", makes_absent, "serve; write 3; remove 3..4; check all", "check all gives image, may give zero"),
        ("serve", drops, "serve; thread 1: read 3; join", "the guest hangs"),
        ("is_hole", lambda self, page: page == 3, "serve; read 4; pwrite 3", "pwrite 3 gives zero, may give image"),
    ],
)
def test_a_wrong_core_is_found_out(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, method: str, sabotage: object, text: str, what: str
) -> None:
    stage.be_patient(drivers.AGAIN_SECONDS)
    monkeypatch.setattr(memory.Memory, method, sabotage)
    with pytest.raises(Failure, match=what) as failure:
        stage.run(parse(text))
    assert f"scenario: {text}\n" in str(failure.value)
    assert f"tests.scenario reference '{text}'" in str(failure.value)
