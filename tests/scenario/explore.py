"""Runs a scenario over the model: in one order of steps, or in every order that there is.

A schedule is the list of who took each step; the same schedule gives the same run. An exploration goes through all
states that any schedule can reach, and finds what a guest may not see, and whoever can never go on.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from . import guest
from .kernel import Kernel, Steps, Until
from .language import PAGES, KillAt, Plain, Scenario, Serve, Thread
from .model import Journal, PageServer, Rules

STEPS_MAX = 4000
"""Of one run in a random order; one that is not over by then never is."""
HANG = "the guest hangs"


@dataclass
class _Actor:
    """Somebody who takes steps."""

    steps: Steps
    ready: Until | None = None
    over: bool = False

    def may_go(self) -> bool:
        return not self.over and (self.ready is None or self.ready())

    def place(self) -> Iterator[object]:
        """Where it stands: all that its next steps depend on, besides what it shares with others."""
        steps: object = self.steps
        while steps is not None and (frame := getattr(steps, "gi_frame", None)) is not None:
            yield frame.f_lasti
            yield [value for name, value in frame.f_locals.items() if name != "self"]
            steps = getattr(steps, "gi_yieldfrom", None)


class World:
    """A guest, the kernel and a page server, going through one scenario step by step."""

    def __init__(self, scenario: Scenario, rules: Rules | None = None) -> None:
        self.results: dict[int, guest.Result] = {}
        self.history: list[str] = []
        self.over = False
        self._scenario = scenario
        self._rules = rules or Rules()
        self._kernel = Kernel()
        self._journal = Journal()
        self._server: PageServer | None = None
        self._deaths: list[KillAt] = []
        self._death: KillAt | None = None
        self._passed = 0
        self._plan: tuple[int, ...] = ()
        self._main_at = 0
        self._actors = {"main": _Actor(self._main())}
        for number in sorted({op.number for op in scenario.ops if isinstance(op, Thread)}):
            self._actors[f"thread {number}"] = _Actor(self._thread(number))

    def choices(self) -> list[str]:
        """Who can take the next step. Nobody, and not ``over``: they wait for ever."""
        return [] if self.over or self.failed else [name for name, actor in self._actors.items() if actor.may_go()]

    @property
    def failed(self) -> str | None:
        """Why the page server has given the VM up."""
        return self._server.failed if self._server else None

    def wrong(self) -> str | None:
        """What is wrong now, where nobody can go on."""
        if self.failed:
            return f"the page server fails the VM: {self.failed}"
        return guest.explain(self._scenario, self.results) if self.over else HANG

    def step(self, name: str) -> None:
        """Let one of `choices` take its step."""
        actor = self._actors[name]
        try:
            came_to = next(actor.steps)
        except StopIteration:
            actor.over = True
            self.history.append(f"{name}: ends")
            return
        actor.ready = came_to if callable(came_to) else None
        self.history.append(f"{name}: " + ("waits" if callable(came_to) else came_to))
        if self._death and came_to == self._death.point and name in self._server_names():
            self._passed += 1
            if self._passed > self._death.after:
                self._begin(adopts=True)

    def state(self) -> str:
        """All that the rest of the run depends on."""
        shared = (self._kernel, self._journal, self._server, self._deaths, self._death, self._passed, self.results)
        places = [(name, actor.over, *actor.place()) for name, actor in self._actors.items()]
        return repr((shared, self._main_at, places))

    # --- the scenario ----------------------------------------------------------------------------

    def _main(self) -> Steps:
        for at, op in enumerate(self._scenario.ops):
            self._main_at = at
            match op:
                case KillAt():
                    self._deaths.append(op)
                case Serve():
                    yield f"{op}"
                    self._plan = op.plan
                    self._begin(adopts=False)
                case Plain("kill"):
                    yield "kill"
                    self._die()
                case Plain("adopt"):
                    yield "adopt"
                    self._begin(adopts=True)
                case Plain("exit"):
                    yield from self._exit()
                case Plain():
                    yield from self._join(at)
                    if op.words == "check all":
                        yield from self._check(at)
                case Thread():
                    pass
                case deed:
                    self.results[at] = yield from self._kernel.do(0, deed)
        self._main_at = len(self._scenario.ops)
        if not self._kernel.exited:
            yield from self._join(self._main_at)
        self.over = True
        return ""

    def _thread(self, number: int) -> Steps:
        for at, op in enumerate(self._scenario.ops):
            if isinstance(op, Thread) and op.number == number:
                yield partial(self._has_passed, at)
                self.results[at] = yield from self._kernel.do(number, op.deed)
        return ""

    def _join(self, at: int) -> Steps:
        given = [n for n, op in enumerate(self._scenario.ops[:at]) if isinstance(op, Thread)]
        yield lambda: all(n in self.results for n in given)
        return ""

    def _has_passed(self, at: int) -> bool:
        return self._main_at > at

    def _check(self, at: int) -> Steps:
        seen: tuple[str, ...] = ()
        for page in range(PAGES):
            seen = (*seen, (yield from self._kernel.reach(0, page)))
        self.results[at] = seen
        return ""

    def _exit(self) -> Steps:
        yield "exit"
        self._kernel.exited = True
        for name, actor in self._actors.items():
            actor.over = actor.over or name.startswith("thread")
        yield lambda: all(self._actors[name].over for name in self._server_names())
        return ""

    def _begin(self, adopts: bool) -> None:
        self._die()
        self._death, self._passed = (self._deaths.pop(0) if self._deaths else None), 0
        server = PageServer(self._kernel, self._journal, self._rules, self._plan, adopts)
        self._server = server
        for name, steps in {"faults": server.serve(), **server.fillers()}.items():
            self._actors[name] = _Actor(steps)

    def _die(self) -> None:
        self._server, self._death = None, None
        for name in self._server_names():
            del self._actors[name]

    def _server_names(self) -> list[str]:
        return [name for name in self._actors if name.startswith(("faults", "filler"))]


# --- runs ----------------------------------------------------------------------------------------

Schedule = list[str]


def replay(scenario: Scenario, schedule: Schedule, rules: Rules | None = None) -> World:
    """The world after these steps."""
    world = World(scenario, rules)
    for name in schedule:
        world.step(name)
    return world


@dataclass
class Finding:
    """What went wrong, in which scenario, and in which order of steps."""

    what: str
    scenario: Scenario
    schedule: Schedule
    rules: Rules | None = None

    def __str__(self) -> str:
        steps = "\n".join(replay(self.scenario, self.schedule, self.rules).history)
        return f"{self.what}\nscenario: {self.scenario}\nschedule: {self.schedule}\n{steps}"


def walk(scenario: Scenario, seed: int, rules: Rules | None = None) -> Finding | None:
    """Run ``scenario`` in the random order of this seed."""
    world, order = World(scenario, rules), random.Random(seed)
    schedule: Schedule = []
    while len(schedule) < STEPS_MAX and (choices := world.choices()):
        schedule.append(order.choice(choices))
        world.step(schedule[-1])
    wrong = world.wrong()
    return Finding(wrong, scenario, schedule, rules) if wrong else None


class Exploration:
    """All states that a scenario can come to, the nearest first, until one is wrong."""

    def __init__(self, scenario: Scenario, rules: Rules | None = None) -> None:
        self.finding: Finding | None = None
        self._scenario = scenario
        self._rules = rules
        self._schedules: dict[str, Schedule] = {}  # each state: a shortest way to it
        self._before: dict[str, set[str]] = {}  # each state: those that lead to it
        self._ends: set[str] = set()
        self._explore()
        if self.finding is None:
            self._find_hang()

    @property
    def states(self) -> int:
        """How many states there are."""
        return len(self._schedules)

    def _explore(self) -> None:
        start = World(self._scenario, self._rules)
        self._schedules[start.state()] = []
        left = deque([(start.state(), choice) for choice in start.choices()])
        while left and self.finding is None:
            origin, choice = left.popleft()
            schedule = [*self._schedules[origin], choice]
            world = replay(self._scenario, schedule, self._rules)
            state = world.state()
            self._before.setdefault(state, set()).add(origin)
            if state not in self._schedules:
                self._schedules[state] = schedule
                left += [(state, choice) for choice in world.choices()]
                self._judge(world, state)

    def _judge(self, world: World, state: str) -> None:
        if world.over or world.failed:
            self._ends.add(state)
            if wrong := world.wrong():
                self._find(wrong, state)

    def _find_hang(self) -> None:
        """A state from which no order of steps leads to the end: somebody waits, or goes round, for ever."""
        fine, left = set(self._ends), list(self._ends)
        while left:
            news = self._before.get(left.pop(), set()) - fine
            fine |= news
            left += news
        if stuck := [state for state in self._schedules if state not in fine]:
            self._find(HANG, stuck[0])

    def _find(self, wrong: str, state: str) -> None:
        self.finding = self.finding or Finding(wrong, self._scenario, self._schedules[state], self._rules)
