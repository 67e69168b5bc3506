"""SIGKILL at every instant that leaves something else behind, in every situation of its VM; then another goes on."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.crash.conftest import Begin
from tests.crash.world import Server, World, is_gone, waits
from tests.fakes.vmm import Job, eventually

pytestmark = pytest.mark.needs_uffd

POINTS = [
    "read", "apply", "clear", "intend", "install", "note", "fill-intend", "fill-install", "fill-note",
    "adopt-apply", "adopt-wake", "adopted",
]  # fmt: skip
OUTSIDE = "outside"
"""No point of the core's: killed by somebody else once the VM is in its situation."""

# Pages by address; image page 41, a hole, is page 1.
WARM = [20, 21, 22]
FAULTS = [30, 9, 1, 30]
"""Each in a thread of its own."""
REREAD, LEFT, BEFORE = WARM
"""Given back: one is read again by the thread that did it, one is left alone, one went before."""
PLAN = [50, 51, 52, 10, 2, REREAD, 12, 60, LEFT, 61, 33, 34, 35, 36, 7]


@dataclass(frozen=True)
class Situation:
    """What the VM is about when its page server dies. ``warm``: some pages came and one went before."""

    warm: bool = True
    plan: bool = False
    faults: bool = False
    removes: bool = False
    first_death: str | None = None
    """How the first server dies where the second one is to."""


SITUATIONS = {
    "idle": Situation(),
    "faulting": Situation(faults=True, first_death="clear"),
    "replaying": Situation(warm=False, plan=True, faults=True, first_death="fill-note"),
    "removing": Situation(faults=True, removes=True, first_death="read"),
    "adopting": Situation(warm=False, plan=True, faults=True, removes=True, first_death="read"),
}
NO_MESSAGE, NO_PLAN = "an idle VM sends no message", "what is to be filled is a replay's plan: see replaying"
CANNOT = {
    **{(point, "idle"): NO_MESSAGE for point in ("read", "apply", "clear", "intend", "install", "note")},
    **{
        (point, situation): NO_PLAN
        for point in ("fill-intend", "fill-install", "fill-note")
        for situation in ("idle", "faulting")
    },
}
"""Why a server is never at this point in this situation; asserted, by one with the order, which then lives."""


def deaths(point: str, name: str) -> list[str]:
    """At which points the servers die, one after the other."""
    first = SITUATIONS[name].first_death or OUTSIDE
    if point.startswith("adopt"):
        return [first, point, point] if name == "adopting" else [first, point]
    return [first, point] if name == "adopting" else [point]


def test_the_points_are_those_of_the_core() -> None:
    source = (Path(__file__).parents[2] / "crates/vmd-core/src/death.rs").read_text()
    assert re.findall(r'\("([a-z-]+)", Self::', source) == POINTS


@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("point", [*POINTS, OUTSIDE])
def test_another_goes_on(begin: Begin, point: str, name: str) -> None:
    world, situation = begin(), SITUATIONS[name]
    if point.startswith("fill") and name == "removing":
        situation = replace(situation, warm=False, plan=True)
    first, *others = deaths(point, name)
    if situation.warm:
        server, jobs = warm(world, situation, first)
    else:
        jobs = act(world, situation)
        server = serve_plan(world, first)
    if (point, name) in CANNOT:
        results(jobs)
        assert server.is_alive(), f"{CANNOT[point, name]}, and yet it came to {point}"
        server.kill()
    elif first == OUTSIDE:
        server.kill()
    check_death(world, server)
    assert not world.left()["replay_done"]
    for order in others:
        server = world.go_on(death=order_of(order))
        if order == OUTSIDE:
            server.hear("serving")
            server.kill()
        check_death(world, server)
    check_life(world, situation, jobs)


def order_of(point: str, after: int = 0) -> list[object] | None:
    return None if point == OUTSIDE else [point, after]


def warm(world: World, situation: Situation, point: str) -> tuple[Server, list[Job]]:
    """A server that has worked already, and is then faced with all that the VM does at once."""
    passed = len(WARM) + (0 if point in ("intend", "install", "note") else 1)
    server = world.serve(death=order_of(point, passed))
    for page in WARM:
        assert world.vmm.verdicts([page]) == ["image"]
    assert world.vmm.do("remove", [BEFORE]) == ["ok"]
    world.removed.add(BEFORE)
    server.stop()
    jobs = act(world, situation)
    if point != OUTSIDE:
        server.send(signal.SIGCONT)
    return server, jobs


def serve_plan(world: World, point: str) -> Server:
    """A server that is to replay. It never comes to the end: it dies of the replay itself, or is held."""
    held = None if point.startswith("fill") else [5, 1 << 30]  # demand takes two, the plan has ten runs
    after = 1 if point.startswith("fill") and not world.removed else 0
    server = world.serve(beside="replay", offsets=world.offsets(PLAN), refused=held, death=order_of(point, after))
    if point == OUTSIDE:
        server.hear("serving")
        eventually(lambda: world.left()["replayed"] >= 1, "it replays")
    return server


def act(world: World, situation: Situation) -> list[Job]:
    """What the VM does; its threads wait by then."""
    jobs = []
    if situation.faults:
        jobs.append(world.vmm.start("verdict", FAULTS, threads=len(FAULTS), split=True))
    if situation.removes:
        pages = [REREAD, LEFT]
        jobs.append(world.vmm.start("remove_then_verdict", [REREAD]))
        jobs.append(world.vmm.start("remove", [LEFT]))
        world.removed.update(pages)
    waits(world.vmm, len(FAULTS) * situation.faults, 2 * situation.removes)
    return jobs


def results(jobs: Sequence[Job]) -> list[str]:
    return [said for job in jobs for thread in job.wait() for said in thread]


def check_death(world: World, server: Server) -> None:
    server.died()
    assert is_gone(server.pid)
    left = world.left()
    assert (left["server_pid"], left["ended"], left["vmm_pid"]) == (server.pid, 0, world.vmm.pid)
    assert world.vmm.is_alive()


def check_life(world: World, situation: Situation, jobs: Sequence[Job]) -> None:
    served = world.adopt()
    said = ["image", "image", "zero", "image"] * situation.faults + ["zero", "ok"] * situation.removes
    assert results(jobs) == said
    absent = set()
    if situation.plan:
        served.replayed()
        assert world.vmm.resident() >= set(PLAN) - world.removed
    if situation.removes:
        absent.add(LEFT)
    removed = 1 + 2 * situation.removes if situation.warm else 0
    counters = world.is_whole(served, absent, removed)
    assert (counters.replayed > 0) == situation.plan
    served.finish()
