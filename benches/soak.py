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
import threading
import time
from dataclasses import replace
from pathlib import Path

from vmd import sandbox as sandboxes
from vmd import template as templates
from vmd.errors import VmdError
from vmd.settings import Settings
from vmd.template import Shape

from .samples import p99

NAME, MEM_MIB = "soak", 32
START = "sweep pages=2048 order=scattered write=30"
DETACHED_EVERY = 10
_CHECK_SECONDS = 60.0
_END_SECONDS = 5.0


def main() -> int:
    """Exit code 1 when a word was wrong, a guest hung, or anything was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=1000)
    cycles = parser.parse_args().cycles
    with tempfile.TemporaryDirectory(prefix="vmd-soak-") as state, tempfile.TemporaryDirectory(dir="/dev/shm") as run:
        os.environ |= {"VMD_STATE_DIR": state, "VMD_RUN_DIR": run}  # inherited: marks whose processes are ours
        settings = replace(Settings.read(), state_dir=Path(state), run_dir=Path(run))
        seen, left = asyncio.run(soak(settings, cycles))
    print(
        f"soak: {cycles} cycles, {seen.wrong_words} wrong words, {seen.hung} hung or failed;"
        f" create {sorted(seen.create_ms)[cycles // 2]:.0f} ms median, {p99(seen.create_ms):.0f} ms p99"
    )
    print("soak: left: " + (", ".join(left) or "nothing (processes, fds, threads, sockets, files)"))
    return 1 if seen.wrong_words or seen.hung or left else 0


class Seen:
    """What the cycles saw."""

    def __init__(self) -> None:
        self.wrong_words = 0
        self.hung = 0
        self.create_ms: list[float] = []


async def soak(settings: Settings, cycles: int) -> tuple[Seen, list[str]]:
    """Build the template, run the cycles; what they saw, and what is left of them."""
    await templates.build(settings, NAME, Shape(MEM_MIB, start=START))
    seen = Seen()
    await _cycle(settings, seen, detached=False)  # the first fills caches and pools, which stay
    before = inventory(settings)
    seen = Seen()
    for number in range(cycles):
        try:
            await _cycle(settings, seen, detached=number % DETACHED_EVERY == 0)
        except VmdError as failure:
            seen.hung += 1
            print(f"soak: cycle {number}: {failure}", file=sys.stderr)
    return seen, await _left(settings, before)


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


async def _left(settings: Settings, before: dict[str, int]) -> list[str]:
    """What there is more of than before, once the dying have died."""
    deadline = time.monotonic() + _END_SECONDS
    while (after := inventory(settings)) != before and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return [f"{after[kind] - count} {kind}" for kind, count in before.items() if after[kind] > count]


def inventory(settings: Settings) -> dict[str, int]:
    """How many of each kind of thing that a sandbox could leave there are."""
    return {
        "processes": sum(_is_ours(process) for process in Path("/proc").iterdir() if process.name.isdigit()),
        "fds": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": threading.active_count() + len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "sockets": Path("/proc/net/unix").read_text(errors="replace").count(str(settings.run_dir)),
        "files": sum(1 for folder in (settings.run_dir, settings.state_dir) for _ in folder.rglob("*")),
    }


def _is_ours(process: Path) -> bool:
    """Whether a process carries this soak's environment."""
    try:
        return f"VMD_RUN_DIR={os.environ['VMD_RUN_DIR']}".encode() in (process / "environ").read_bytes()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
