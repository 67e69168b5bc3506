"""`make chaos`: pagers and standbys are killed about once a second while their guests work and check every word.

Eight detached sandboxes, on real Firecracker, sweep, write, balloon, are killed and made anew under replay, under
prefetch and on demand. SIGKILL comes at random to the pager, the standby, or both. Where both are dead nobody takes
over: this bench then calls `vmd.pager.start.ensure` at once, as a daemon or systemd would.

The figure is the largest gap between two ticks of a guest around a kill, beside the same without a kill: a guest
that loses its CPU to another process ticks no more than one that waits for a page. So of the eight only as many
run at once as there are CPUs (``--running``), in turns; the others are paused, and taken over all the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from vmd import sandbox as sandboxes
from vmd import store
from vmd import template as templates
from vmd.errors import VmdError
from vmd.pager.start import LOG
from vmd.settings import Settings
from vmd.states import State
from vmd.tasks import cancel
from vmd.template import Shape

from .guests import Place, Seen
from .kills import Incident, Killer, Kind, kind_of
from .left import inventory, left, quiet
from .samples import Samples, bar, columns, p99, refuse_debug_build

PLACES = 8
START = "sweep pages=3000 order=scattered write=20"
SHAPES = {"small": Shape(64, start=START), "middle": Shape(96, start=START), "large": Shape(128, start=START)}
WITHOUT_RECORDING = "middle"
"""Its sandboxes prefetch in sequence instead of replaying."""
PREFETCH_BYTES_MAX = 16 << 20
"""Most of the memory comes on demand."""

GAP_MS_MAX, BOTH_GAP_MS_MAX = 100.0, 1000.0
FULL_SECONDS, PAGER_KILLS_MIN = 600.0, 500
_LOOK_SECONDS = 0.05
_LOG_LINES = 20


def main() -> int:
    """Exit code 1 for a wrong word, a guest that hung, anything left; without ``--report`` for a gap too long, too."""
    options = _options()
    refuse_debug_build()
    samples = Samples("chaos", seed=options.seed, seconds=options.seconds, running=options.running)
    print(f"chaos: seed {options.seed}, {options.seconds:g} s, {PLACES} VMs, {options.running} of them run at once")
    with _directories() as settings:
        before = asyncio.run(_prepare(settings))
        seen, killer = Seen(), Killer(settings, options.seed)
        asyncio.run(_chaos(settings, options.running, options.seed, options.seconds, seen, killer))
        remains = left(settings, before)
        failures = [*seen.failures, *killer.failures]
        if failures or remains:
            _tell_log(settings)
    _gather(samples, seen, killer.incidents)
    print(_table(samples))
    _tell(seen, killer, failures, remains)
    print(f"chaos: samples in {samples.save()}")
    holds = _bars(samples, killer.incidents, options.seconds)
    return 1 if seen.wrong or failures or remains or not (holds or options.report) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=FULL_SECONDS)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31), help="draws kills and work anew")
    parser.add_argument("--running", type=int, default=os.cpu_count() or 1, help="guests that run at once")
    parser.add_argument("--report", action="store_true", help="gaps that are too long are told, and are no failure")
    return parser.parse_args()


@contextlib.contextmanager
def _directories() -> Iterator[Settings]:
    """Private state and run directories in memory: what is measured waits for no disk."""
    with (
        tempfile.TemporaryDirectory(prefix="vmd-chaos-", dir="/dev/shm") as state,
        tempfile.TemporaryDirectory(prefix="vmd-chaos-", dir="/dev/shm") as run,
    ):
        os.environ |= {"VMD_STATE_DIR": state, "VMD_RUN_DIR": run}  # inherited: marks whose processes are ours
        settings = replace(Settings.read(), state_dir=Path(state), run_dir=Path(run))
        yield replace(settings, prefetch_bytes_max=PREFETCH_BYTES_MAX)


async def _prepare(settings: Settings) -> dict[str, int]:
    """Build the templates; what there is when nothing runs. A first cycle fills caches and pools, which stay."""
    for name, shape in SHAPES.items():
        template = await templates.build(settings, name, shape)
        if name == WITHOUT_RECORDING:
            template.access_log.unlink()
        await (await sandboxes.create(settings, name, detached=True)).kill()
    await asyncio.to_thread(quiet, settings)
    return inventory(settings)


async def _chaos(settings: Settings, running: int, seed: int, seconds: float, seen: Seen, killer: Killer) -> None:
    until = time.monotonic() + seconds
    turn = asyncio.Semaphore(running)
    places = [Place(settings, list(SHAPES), turn, seen, f"{seed} place {number}") for number in range(PLACES)]
    looking = asyncio.ensure_future(_look(settings, seen))
    killing = asyncio.ensure_future(killer.run(until))
    try:
        await asyncio.gather(*(place.live(until) for place in places))
    finally:
        await cancel(looking, killing)
        for sandbox in sandboxes.list_all(settings):  # of a run that failed
            with contextlib.suppress(VmdError):
                await sandbox.kill()


async def _look(settings: Settings, seen: Seen) -> None:
    """Somebody looks all the time, as `vmd ls` does, which has VMs adopted that it finds unserved."""
    while True:
        try:
            states = await asyncio.to_thread(_list, settings, seen)
        except VmdError as failure:
            seen.fail(f"looked: {failure}")
        else:
            seen.did.update(f"saw {state}" for state in states)
        await asyncio.sleep(_LOOK_SECONDS)


def _list(settings: Settings, seen: Seen) -> list[State]:
    store.sweep_runs(settings)
    sandboxes.recover(settings, seen.warn)
    return [sandbox.state() for sandbox in sandboxes.list_all(settings)]


def _gather(samples: Samples, seen: Seen, incidents: Sequence[Incident]) -> None:
    for number, window in enumerate(seen.windows):
        kind = kind_of(window, incidents)
        if kind is not None:
            samples.add(kind, "gap_ms", window.gap_ms, number=number)
            samples.add(kind, "window_ms", (window.answered - window.sent) * 1000, number=number)
            samples.add(kind, "faults", window.faults, number=number)
    for number, incident in enumerate(incidents):
        samples.add(incident.kind, "recovered_ms", (incident.over - incident.kills[-1]) * 1000, number=number)
    for number, value in enumerate(seen.create_ms):
        samples.add("create", "create_ms", value, number=number)


def _table(samples: Samples) -> str:
    rows = [("killed", "metric", "n", "median", "p99", "max")]
    for metric in ("gap_ms", "window_ms", "faults", "recovered_ms", "create_ms"):
        for way in (*Kind, "create"):
            with contextlib.suppress(KeyError):
                values = samples.values(way, metric)
                figures = (statistics.median(values), p99(values), max(values))
                rows.append((way, metric, str(len(values)), *(f"{figure:.1f}" for figure in figures)))
    return columns(rows)


def _tell(seen: Seen, killer: Killer, failures: Sequence[str], remains: Sequence[str]) -> None:
    kinds = Counter(incident.kind for incident in killer.incidents)
    print("chaos: killed: " + ", ".join(f"{kinds[kind]} x {kind}" for kind in Kind if kind is not Kind.NONE))
    print(f"chaos: both were dead {killer.owner_calls} times, and this bench started a pager at once, as systemd would")
    print("chaos: done: " + ", ".join(f"{count} x {what}" for what, count in sorted(seen.did.items())))
    print(f"chaos: {seen.wrong} wrong words, {len(failures)} hung or failed")
    for line in failures:
        print(f"chaos: failed: {line}")
    print("chaos: left: " + (", ".join(remains) or "nothing (processes, fds, threads, sockets, files)"))


def _tell_log(settings: Settings) -> None:
    with contextlib.suppress(FileNotFoundError):
        for line in (settings.run_dir / LOG).read_text().splitlines()[-_LOG_LINES:]:
            print(f"chaos: pager.log: {line}")


def _bars(samples: Samples, incidents: Sequence[Incident], seconds: float) -> bool:
    """Print each; whether all hold. A run that is not a full one need not have killed so often."""
    kills = float(sum(incident.kind is Kind.PAGER for incident in incidents))
    bars = [
        ("pager kills", kills, kills >= PAGER_KILLS_MIN or seconds < FULL_SECONDS, f">= {PAGER_KILLS_MIN} in 600 s")
    ]
    for kind, most in ((Kind.PAGER, GAP_MS_MAX), (Kind.BOTH, BOTH_GAP_MS_MAX), (Kind.EARLY, BOTH_GAP_MS_MAX)):
        with contextlib.suppress(KeyError):
            gap = p99(samples.values(kind, "gap_ms"))
            bars.append((f"largest tick gap, {kind} killed, p99, ms", gap, gap < most, f"< {most:g}"))
    for name, value, holds, wanted in bars:
        print(bar(name, value, holds, wanted))
    return all(holds for _, _, holds, _ in bars)


if __name__ == "__main__":
    sys.exit(main())
