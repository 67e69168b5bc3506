"""The whole flow on this host, measured: freeze, record, then thaw in three ways, turn by turn.

A sample is the time from before the VMM is spawned to the guest's answer that it has found every
word of the swept pages right. The swept set is the recorded one, its order re-drawn within windows
of a tenth of it, because no two starts touch their pages in the same order.
"""

from __future__ import annotations

import asyncio
import random
import re
import secrets
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import template as templates
from .backend import Asked, Request
from .errors import BackendUnavailable, NotFound, SnapshotError, VmdError
from .pages.cores import core_name
from .restore import restore
from .settings import Settings
from .tasks import finish
from .template import Shape, Template
from .vmm.process import find_firecracker

NAME = "demo"
RUNS, MEM_MIB = 20, 512
PARTS = ("spawn", "load", "sweep")

_WRITE_PERCENT = 30
_SWEEP_SECONDS = 60.0
_READ_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Way:
    """One way to thaw: a row of the table."""

    key: str
    label: str
    backend: Asked
    replays: bool


WAYS = (
    Way("file", "File, page cache warm", "file", False),
    Way("on_demand", "userfaultfd, on demand", "uffd", False),
    Way("replay", "userfaultfd, replay", "uffd", True),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One restore, in ms: ``spawn`` up to the VMM's API, ``load`` up to the guest's first answer, ``sweep``."""

    spawn: float
    load: float
    sweep: float
    wrong_words: int

    @property
    def total(self) -> float:
        """Spawn to checked answer."""
        return self.spawn + self.load + self.sweep


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured: samples by way, in the order in which they were taken."""

    mem_mib: int
    pages: int
    core: str
    samples: dict[str, list[Sample]]

    @property
    def wrong_words(self) -> int:
        """Of all runs; anything but 0 is a failure of the demonstration."""
        return sum(sample.wrong_words for samples in self.samples.values() for sample in samples)

    def median(self, key: str, part: str = "total") -> float:
        """Of one way, whole or one of `PARTS`, in ms."""
        times: list[float] = [getattr(sample, part) for sample in self.samples[key]]
        return statistics.median(times)

    def p99(self, key: str) -> float:
        """The smallest sample that 99 % do not exceed, in ms."""
        totals = sorted(sample.total for sample in self.samples[key])
        return totals[-(-99 * len(totals) // 100) - 1]

    def save(self) -> dict[str, Any]:
        """The object of ``vmd demo --json`` (interfaces.md)."""
        return {
            "runs": len(self.samples["file"]),
            "mem_mib": self.mem_mib,
            "pages": self.pages,
            "core": self.core,
            **{way.key: self._row(way.key) for way in WAYS},
            "seen": self.sentence(),
        }

    def sentence(self) -> str:
        """What was seen, in one sentence."""
        file, demand, ours = (self.median(way.key) for way in WAYS)
        core = "" if self.core == "native" else " (served by the slow reference core)"
        if self.wrong_words:
            return f"{self.wrong_words} words of guest memory were wrong: nothing else here counts."
        if ours < file:
            return (
                f"Replay{core} gave a checked answer after {ours:.0f} ms: {file / ours:.1f} times as fast as File with "
                f"a warm page cache ({file:.0f} ms), {demand / ours:.1f} times as fast as on demand, no word wrong."
            )
        lost = {part: self.median("replay", part) - self.median("file", part) for part in PARTS}
        worst = max(lost, key=lambda part: lost[part])
        return (
            f"Replay{core} was not faster than File with a warm page cache: {ours:.0f} against {file:.0f} ms, "
            f"{(ours / file - 1) * 100:.0f} % more; it lost most in {worst} ({lost[worst]:+.0f} ms)."
        )

    def _row(self, key: str) -> dict[str, Any]:
        return {
            "median_ms": round(self.median(key), 3),
            "p99_ms": round(self.p99(key), 3),
            "ratio_to_file": round(self.median(key) / self.median("file"), 4),
            "wrong_words": sum(sample.wrong_words for sample in self.samples[key]),
            "parts_ms": {part: round(self.median(key, part), 3) for part in PARTS},
        }


async def run(
    settings: Settings,
    *,
    runs: int = RUNS,
    mem_mib: int = MEM_MIB,
    warn: Callable[[str], None] = lambda line: None,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Build the template ``demo`` unless it is there, then take ``runs`` samples of each way.

    Raises `BackendUnavailable` when a breaker is open, and what building and restoring raise.
    """
    if not (settings.uffd_enabled and settings.prefetch_enabled):
        raise BackendUnavailable(
            "demo: it compares userfaultfd and replay, and a breaker is open",
            hint="unset VMD_UFFD_ENABLED and VMD_UFFD_PREFETCH_ENABLED",
        )
    template = await prepare(settings, Shape(mem_mib, start=sweep_command(mem_mib, 1)), warn=warn, progress=progress)
    await asyncio.to_thread(_warm, template)
    samples: dict[str, list[Sample]] = {way.key: [] for way in WAYS}
    for number in range(runs + 1):
        progress(f"round {number} of {runs}" if number else "warming up")
        for way in random.sample(WAYS, len(WAYS)):
            sample = await _take(settings, template, way, sweep_command(mem_mib, 2 + number), warn)
            if number:  # the round before the first fills caches and counts for nothing
                samples[way.key].append(sample)
    return Report(mem_mib, sweep_pages(mem_mib), core_name(settings.core), samples)


async def prepare(
    settings: Settings, shape: Shape, *, warn: Callable[[str], None], progress: Callable[[str], None]
) -> Template:
    """The template ``demo`` of this shape, kept from the last time or built anew."""
    try:
        found = templates.load(settings, NAME)
        if found.shape == shape and found.access_log.exists():
            found.snapshot.check()
            await found.snapshot.require_format(Path(find_firecracker(settings)))
            return found
        await asyncio.to_thread(templates.remove, settings, NAME)
    except NotFound:
        pass
    except SnapshotError as failure:
        warn(f"{failure}; building it anew")
        await asyncio.to_thread(templates.remove, settings, NAME)
    built = await templates.build(settings, NAME, shape, warn=warn, progress=progress)
    if not built.access_log.exists():
        raise VmdError(f"demo: the recording came to nothing ({built.recording_ended})", hint="vmd doctor")
    return built


def sweep_pages(mem_mib: int) -> int:
    """Pages that a sweep touches: 24 MiB of 512."""
    return mem_mib * 12


def sweep_command(mem_mib: int, order: int) -> str:
    """The guest's command: scattered runs over half of its memory, rewriting some; ``order`` re-draws the order."""
    pages = sweep_pages(mem_mib)
    return (
        f"sweep pages={pages} span={mem_mib * 128} order=scattered seed=1 write={_WRITE_PERCENT} "
        f"displace={pages // 10} seed2={order}"
    )


async def _take(settings: Settings, template: Template, way: Way, command: str, warn: Callable[[str], None]) -> Sample:
    request = Request(
        f"build-demo-{secrets.token_hex(4)}", template.name, template.snapshot, way.backend, template.access_log
    )
    began = time.monotonic()
    restored = await restore(request, replace(settings, prefetch_enabled=way.replays), warn=warn)
    try:
        ready = time.monotonic()
        answer = await restored.ask(command, _SWEEP_SECONDS)
        done = time.monotonic()
    finally:
        await finish(restored.close())
    spawn = restored.timings_ms["spawn"]
    return Sample(
        spawn=spawn,
        load=(ready - began) * 1000 - spawn,
        sweep=(done - ready) * 1000,
        wrong_words=_wrong_words(answer, sweep_pages(template.shape.mem_mib)),
    )


def _wrong_words(answer: str, pages: int) -> int:
    """The count in the guest's answer. Raises `VmdError` when it did not sweep what it was asked to."""
    found = dict(re.findall(r"(\w+)=(\w+)", answer))
    if not answer.startswith("ok ") or found.get("pages") != str(pages):
        raise VmdError(f"demo: the guest answered {answer!r}, not that it swept {pages} pages")
    return int(found["wrong"])


def _warm(template: Template) -> None:
    """Bring all of the memory file into the page cache, its holes too: File has to be at its best."""
    with template.snapshot.memory.open("rb", buffering=0) as memory:
        while memory.read(_READ_BYTES):
            pass
