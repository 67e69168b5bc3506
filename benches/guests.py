"""The guests of `benches.chaos`: made, put to work in turns, checked, killed, and made anew."""

from __future__ import annotations

import asyncio
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from vmd import limits
from vmd import sandbox as sandboxes
from vmd.errors import Conflict, VmdError, VmmError
from vmd.pager import look
from vmd.sandbox import Sandbox
from vmd.settings import Settings
from vmd.states import State
from vmd.vmm.api import Api
from vmd.vmm.process import API_SOCKET

from .kills import Window

# Far beyond what a command takes under eight busy guests; far above 10 s, after which a page server fails its VM.
ASK_SECONDS = 120.0
# Frozen, to whoever asks, between the death of both and the adoption.
_FROZEN_SECONDS = 10.0
_FROZEN_STEP_SECONDS = 0.005
# A life is short: only a guest that still misses pages waits for a page server.
_TURNS_MIN, _TURNS_MAX = 2, 8
_WINDOWS_MAX = 6
_TOUCHES_MAX = 1000
# Of lives: how many end in the middle of a command, and how many with a look at all of their memory.
_CUT_SHORT, _CHECKED = 0.15, 0.15
_CUT_SECONDS = 0.2
_BALLOON_MIB = (0, 4, 8, 16)


@dataclass
class Seen:
    """What all guests saw together. ``wrong``: words; ``failures``: hung or failed, one line each."""

    wrong: int = 0
    failures: list[str] = field(default_factory=list)
    did: Counter[str] = field(default_factory=Counter)
    windows: list[Window] = field(default_factory=list)
    create_ms: list[float] = field(default_factory=list)

    def warn(self, line: str) -> None:
        """Of a VM that cannot be adopted. One that is wanted makes its guest fail; one being killed may meet it too."""
        print(f"chaos: {line}", file=sys.stderr, flush=True)
        self.did["warned"] += 1

    def fail(self, line: str) -> None:
        print(f"chaos: {line}", file=sys.stderr, flush=True)
        self.failures.append(line)


class Place:
    """One of the places for a VM: a VM after the other lives in it.

    ``turn`` bounds how many guests run at once; the others are paused. An idle guest polls its
    console and takes a whole CPU: with more of them than CPUs the gaps would be the host scheduler's.
    """

    def __init__(
        self, settings: Settings, templates: list[str], turn: asyncio.Semaphore, seen: Seen, seed: str
    ) -> None:
        self._settings = settings
        self._templates = templates
        self._turn = turn
        self._seen = seen
        self._draw = random.Random(seed)

    async def live(self, until: float) -> None:
        """VMs until then; a failure ends a VM, not this."""
        while time.monotonic() < until:
            try:
                await self._life(until)
            except VmdError as failure:
                self._seen.fail(str(failure))

    async def _life(self, until: float) -> None:
        async with self._turn:
            began = time.perf_counter()
            sandbox = await sandboxes.create(self._settings, self._draw.choice(self._templates), detached=True)
            self._seen.create_ms.append((time.perf_counter() - began) * 1000)
            self._seen.did["VMs"] += 1
            guest = Guest(sandbox, self._draw, self._seen)
            try:
                await guest.prepare()
            except BaseException:
                await sandbox.kill()
                raise
        try:
            await self._turns(guest, until)
        finally:
            guest.close()
            await sandbox.kill()

    async def _turns(self, guest: Guest, until: float) -> None:
        for _ in range(self._draw.randint(_TURNS_MIN, _TURNS_MAX)):
            if time.monotonic() > until:
                break
            async with self._turn:
                await guest.awake(guest.work)
        end = self._draw.random()
        async with self._turn:
            if end < _CUT_SHORT:
                await guest.cut_short()
            elif end < _CUT_SHORT + _CHECKED or time.monotonic() > until:
                await guest.awake(guest.check)


class Guest:
    """One VM, paused between its turns."""

    def __init__(self, sandbox: Sandbox, draw: random.Random, seen: Seen) -> None:
        self._sandbox = sandbox
        self._draw = draw
        self._seen = seen
        self._journal = Path(sandbox.record.journal or "")
        self._api = Api(Path(sandbox.record.directory) / API_SOCKET)
        self._pages = 0
        self._has_balloon = False

    async def prepare(self) -> None:
        """Ask it what it is, and leave it paused."""
        self._pages = int((await self._ask("info"))["pages"])
        self._has_balloon = "device=1" in await self._answer("balloon")
        await self._patch("/vm", {"state": "Paused"})

    async def awake(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do ``work`` between a resume and a pause."""
        await self._patch("/vm", {"state": "Resumed"})
        await work()
        await self._patch("/vm", {"state": "Paused"})

    async def work(self) -> None:
        """Some commands, one after the other."""
        for _ in range(self._draw.randint(1, _WINDOWS_MAX)):
            await self._window()

    async def _window(self) -> None:
        """A command, and how long the guest stood still at most meanwhile."""
        sent = time.monotonic()
        await self._ask("ticks reset=1")
        began, before = time.monotonic(), look.read(self._journal).counters
        await self._command()
        after, ended = look.read(self._journal).counters, time.monotonic()
        ticks = await self._ask("ticks")
        gap_ms = int(ticks["gap_max"]) / int(ticks["tsc_khz"])
        takeovers, faults = after.takeovers - before.takeovers, after.faults - before.faults
        self._seen.windows.append(Window(sent, began, ended, time.monotonic(), gap_ms, takeovers, faults))

    async def check(self) -> None:
        """Every word of its memory."""
        await self._ask("check")

    async def cut_short(self) -> None:
        """Leave it in the middle of a sweep; it is killed then."""
        await self._patch("/vm", {"state": "Resumed"})
        asking = asyncio.ensure_future(self._sandbox.ask(self._sweep(), ASK_SECONDS))
        await asyncio.sleep(self._draw.uniform(0, _CUT_SECONDS))
        asking.cancel()
        with suppress(VmdError, asyncio.CancelledError):
            await asking

    def close(self) -> None:
        self._api.close()

    async def _command(self) -> None:
        kind = self._draw.choices(["sweep", "fresh", "check", "balloon"], [800, 100, 3, 97])[0]
        if kind == "balloon":
            await self._balloon(self._draw.choice(_BALLOON_MIB))
        elif kind == "fresh":
            await self._ask(f"fresh pages={self._draw.randint(1, 300)}")
        else:
            await self._ask(self._sweep() if kind == "sweep" else "check")

    def _sweep(self) -> str:
        draw = self._draw
        span = draw.randint(256, self._pages)
        start = draw.randint(0, self._pages - span)
        order = draw.choice(["sequential", "strided", "scattered", "random", "zipf"])
        words = f"pages={draw.randint(64, min(span, _TOUCHES_MAX))} start={start} span={span} order={order}"
        return f"sweep {words} seed={draw.randint(1, 1 << 30)} write={draw.choice([0, 10, 30, 100])}"

    async def _balloon(self, mib: int) -> None:
        """Ask the guest to give up so much in all, beginning somewhere else. Without a balloon nothing happens."""
        if self._has_balloon:
            await self._ask(f"balloon next={self._draw.randrange(self._pages)} stride={self._draw.choice([1, 2, 7])}")
            await self._patch("/balloon", {"amount_mib": mib})

    async def _patch(self, path: str, body: dict[str, object]) -> None:
        await self._api.request("PATCH", path, body, seconds=limits.VMM_REQUEST_SECONDS)

    async def _ask(self, line: str) -> dict[str, str]:
        """The fields of an answer, which is ``ok``. Wrong words are counted, and said."""
        answer = await self._answer(line)
        fields = dict(re.findall(r"(\w+)=(\w+)", answer))
        wrong = int(fields.get("wrong", 0)) + int(fields.get("stale", 0))
        if wrong:
            self._seen.wrong += wrong
            self._seen.fail(f"{self._sandbox.id}: {line}: {answer}")
        if not answer.startswith("ok"):
            raise VmmError(f"{self._sandbox.id}: the guest answered {answer!r} to {line!r}")
        return fields

    async def _answer(self, line: str) -> str:
        """As `vmd exec` asks; while nobody serves the VM that is refused."""
        self._seen.did[line.split()[0]] += 1
        deadline = time.monotonic() + _FROZEN_SECONDS
        while True:
            try:
                return await self._sandbox.ask(line, ASK_SECONDS)
            except Conflict:
                if self._sandbox.state() is State.DEAD or time.monotonic() > deadline:
                    raise
                self._seen.did["refused"] += 1
                await asyncio.sleep(_FROZEN_STEP_SECONDS)
