"""`make soak`: sandboxes created under replay and killed, each guest checking all of its memory.

Every tenth sandbox is detached, with a page server process of its own, as `vmd create` makes it; the
others are served by this process. In the end everything that a sandbox could leave is counted.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from vmd import sandbox as sandboxes
from vmd import template as templates
from vmd.errors import VmdError
from vmd.settings import Settings
from vmd.template import Shape

from .left import inventory, left, quiet
from .samples import p99

NAME, MEM_MIB = "soak", 32
START = "sweep pages=2048 order=scattered write=30"
DETACHED_EVERY = 10
_CHECK_SECONDS = 60.0


def main() -> int:
    """Exit code 1 when a word was wrong, a guest hung, or anything was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    cycles = parser.parse_args().cycles
    with tempfile.TemporaryDirectory(prefix="vmd-soak-") as state, tempfile.TemporaryDirectory(dir="/dev/shm") as run:
        os.environ |= {"VMD_STATE_DIR": state, "VMD_RUN_DIR": run}  # inherited: marks whose processes are ours
        settings = replace(Settings.read(), state_dir=Path(state), run_dir=Path(run))
        before = asyncio.run(prepare(settings))
        seen = asyncio.run(soak(settings, cycles))
        remains = left(settings, before)
    print(
        f"soak: {cycles} cycles, {seen.wrong_words} wrong words, {seen.hung} hung or failed;"
        f" create {sorted(seen.create_ms)[cycles // 2]:.0f} ms median, {p99(seen.create_ms):.0f} ms p99"
    )
    print("soak: left: " + (", ".join(remains) or "nothing (processes, fds, threads, sockets, files)"))
    return 1 if seen.wrong_words or seen.hung or remains else 0


class Seen:
    """What the cycles saw."""

    def __init__(self) -> None:
        self.wrong_words = 0
        self.hung = 0
        self.create_ms: list[float] = []


async def prepare(settings: Settings) -> dict[str, int]:
    """Build the template; what there is when nothing runs. A first cycle fills caches and pools, which stay."""
    await templates.build(settings, NAME, Shape(MEM_MIB, start=START))
    await _cycle(settings, Seen(), detached=False)
    await _cycle(settings, Seen(), detached=True)
    quiet(settings)
    return inventory(settings)


async def soak(settings: Settings, cycles: int) -> Seen:
    """Run the cycles; what they saw."""
    seen = Seen()
    for number in range(cycles):
        try:
            await _cycle(settings, seen, detached=number % DETACHED_EVERY == 0)
        except VmdError as failure:
            seen.hung += 1
            print(f"soak: cycle {number}: {failure}", file=sys.stderr)
    return seen


async def _cycle(settings: Settings, seen: Seen, *, detached: bool) -> None:
    began = time.perf_counter()
    sandbox = await sandboxes.create(settings, NAME, detached=detached)
    seen.create_ms.append((time.perf_counter() - began) * 1000)
    try:
        answer = await sandbox.ask("check", _CHECK_SECONDS)
    finally:
        await sandbox.kill()
    wrong = re.search(r"\bwrong=(\d+)", answer)
    seen.wrong_words += int(wrong[1]) if wrong else 1


if __name__ == "__main__":
    sys.exit(main())
