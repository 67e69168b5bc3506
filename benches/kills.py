"""What `benches.chaos` does to pagers and standbys: who is killed when, and what the guests' windows saw of it."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from vmd.errors import VmdError
from vmd.pager.control import PagerGone
from vmd.pager.start import ensure, running
from vmd.settings import Settings
from vmd.tasks import cancel
from vmd.vmm import process

from .left import is_ours

# Mean of the exponential gaps between the moment when all is well again and the next kill.
_GAP_SECONDS = 0.45
# A pager that takes over is killed at most so long after the one before it: mostly in the middle of it.
_EARLY_SECONDS = 0.03
# A new standby is ready some 30 ms after it is wanted; beyond this there is none, and the run is red.
_READY_SECONDS = 20.0
_LOOK_SECONDS = 0.005


class Kind(enum.StrEnum):
    """What an incident was; NONE is the name of windows without one."""

    NONE = "none"
    PAGER = "pager"
    STANDBY = "standby"
    BOTH = "both"  # at once
    EARLY = "early"  # the pager, and then who takes over from it


_SHARES = {Kind.PAGER: 65, Kind.STANDBY: 20, Kind.BOTH: 10, Kind.EARLY: 5}


@dataclass
class Incident:
    """Kills that belong together, at these times (monotonic, s), until there was a ready standby again."""

    kind: Kind
    kills: list[float] = field(default_factory=list)
    over: float = float("inf")


@dataclass(frozen=True, slots=True)
class Planned:
    """One draw of the schedule: ``wait`` s after all is well, ``second`` s between the kills of EARLY."""

    wait: float
    kind: Kind
    second: float


@dataclass(frozen=True, slots=True)
class Window:
    """What a guest was asked for between two looks at its ticks; times monotonic, s.

    It was asked to reset at ``sent`` and had at ``began``; asked again at ``ended``, answered at ``answered``.
    ``takeovers`` and ``faults`` are those of its page servers meanwhile.
    """

    sent: float
    began: float
    ended: float
    answered: float
    gap_ms: float
    takeovers: int
    faults: int


def schedule(seed: int) -> Iterator[Planned]:
    """The same for the same seed; how the guests' work meets it is the host's affair."""
    draw = random.Random(f"{seed} kills")
    while True:
        kind = draw.choices(list(_SHARES), list(_SHARES.values()))[0]
        yield Planned(draw.expovariate(1 / _GAP_SECONDS), kind, draw.uniform(0, _EARLY_SECONDS))


def kind_of(window: Window, incidents: Sequence[Incident]) -> Kind | None:
    """The kind of the only incident in a window; None where it is not alone, or not wholly inside.

    A guest that waited for a page server waited in the window of the kill: where the kill, or the
    take-over, is outside, the window says nothing of it.
    """
    touching = [one for one in incidents if one.kills[0] <= window.answered and one.over >= window.sent]
    if not touching:
        return Kind.NONE
    [first, *more] = touching
    if more or not all(window.began <= kill <= window.ended for kill in first.kills):
        return None
    taken_over = window.takeovers > 0
    return first.kind if taken_over or first.kind is Kind.STANDBY else None


@dataclass(frozen=True, slots=True)
class Pair:
    """Pidfds of a pager and its standby."""

    pager: int
    standby: int

    def close(self) -> None:
        os.close(self.pager)
        os.close(self.standby)


class Killer:
    """Goes through a schedule. It is the pager's owner too, as a daemon or systemd is: it starts one where all died."""

    def __init__(self, settings: Settings, seed: int) -> None:
        self.incidents: list[Incident] = []
        self.failures: list[str] = []
        self.owner_calls = 0  # because pager and standby were dead
        self._settings = settings
        self._plans = schedule(seed)

    async def run(self, until: float) -> None:
        """Kill until then, or until what is killed does not come back. There are VMs all the time."""
        try:
            pair = await self._ready()
            for plan in self._plans:
                async with self._owning(pair):
                    await asyncio.sleep(min(plan.wait, max(0.0, until - time.monotonic())))
                    if time.monotonic() >= until:
                        return
                    await self._strike(plan, pair)
                    pair = await self._ready()
                    self.incidents[-1].over = time.monotonic()
        except TimeoutError:
            self.failures.append(f"no ready standby within {_READY_SECONDS:g} s")

    async def _strike(self, plan: Planned, pair: Pair) -> None:
        victims = [pair.standby] if plan.kind is Kind.STANDBY else [pair.pager]
        if plan.kind in (Kind.BOTH, Kind.EARLY):
            victims.append(pair.standby)
        if any(process.is_dead(pidfd) for pidfd in victims):
            self.failures.append("a pager or standby ended without being killed")
        self.incidents.append(incident := Incident(plan.kind))
        for victim in victims:
            if incident.kills and plan.kind is Kind.EARLY:
                await asyncio.sleep(plan.second)
            incident.kills.append(time.monotonic())
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(victim, signal.SIGKILL)
        for victim in victims:
            await process.exited(victim)

    @contextlib.asynccontextmanager
    async def _owning(self, pair: Pair) -> AsyncIterator[None]:
        """Start a pager as soon as both of a pair are dead."""

        async def watch() -> None:
            await process.exited(pair.pager)
            await process.exited(pair.standby)
            self.owner_calls += 1
            try:
                await asyncio.to_thread(ensure, self._settings)
            except VmdError as failure:
                self.failures.append(f"owner: {failure}")

        watching = asyncio.ensure_future(watch())
        try:
            yield
        finally:
            await cancel(watching)
            pair.close()

    async def _ready(self) -> Pair:
        """Wait for a pager with a ready standby. Raises TimeoutError."""
        async with asyncio.timeout(_READY_SECONDS):
            while (pair := await asyncio.to_thread(self._look)) is None:
                await asyncio.sleep(_LOOK_SECONDS)
        return pair

    def _look(self) -> Pair | None:
        with contextlib.suppress(VmdError, PagerGone):
            control = running(self._settings)
            if control is not None:
                with control:
                    return self._open(control.status())
        return None

    def _open(self, status: str) -> Pair | None:
        found = re.match(r"pager (\d+)\nstandby (\d+) ready\n", status)
        if found is None:
            return None
        pids = [int(pid) for pid in found.groups()]
        fds = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                fds.append(os.pidfd_open(pid))
        # Looked at after they were opened: a pid could be somebody else's by now, and a pager may not yet have
        # seen that its standby was killed.
        if len(fds) == 2 and all(is_ours(self._settings, pid) for pid in pids) and not any(map(process.is_dead, fds)):
            return Pair(*fds)
        for fd in fds:
            os.close(fd)
        return None
