"""`make bench-restore`: spawn to checked answer, in every way, workload W2, page cache warm.

W2: a guest of 512 MiB sweeps 24 MiB in runs of 1-4 pages scattered over 256 MiB, 30 % of the pages
rewritten; the order is re-drawn for each run within a tenth of the set. Checked: the guest has
compared every word of every swept page.

The ways, in turn:

- ``file``: Firecracker's File backend, the memory file in the page cache;
- ``ours``: userfaultfd with replay, as `vmd create` restores;
- ``floor``: the same, with every recorded page installed between load and resume, and that
  interval subtracted: what is left when memory costs nothing;
- ``on_demand``: our page server without replay;
- ``c_loop``: a demand-only C loop as page server, started beforehand.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import mmap
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from vmd import template as templates
from vmd.backend import Request
from vmd.errors import NotFound
from vmd.pages import uffd as userfault
from vmd.pages.contract import Outcome
from vmd.pages.regions import Regions
from vmd.pages.server import PageServer
from vmd.recording import read_access_log
from vmd.restore import Restored, restore
from vmd.settings import Settings
from vmd.tasks import finish
from vmd.template import Shape, Template
from vmd.vmm.process import find_firecracker
from vmd.vmm.vmm import Vmm

from .rivals import build
from .samples import RESULTS, Samples, bar, refuse_debug_build

NAME, MEM_MIB, PAGES, SPAN = "w2", 512, 6144, 65536
DISPLACE = PAGES // 10
WAYS = ("file", "ours", "floor", "on_demand", "c_loop")
METRICS = ("total_ms", "spawn_ms", "load_ms", "sweep_ms", "demand_pages")
_ASK_SECONDS = 60.0


def sweep(order: int) -> str:
    """The guest's command; ``order`` re-draws the order of the touches."""
    return f"sweep pages={PAGES} span={SPAN} order=scattered seed=1 write=30 displace={DISPLACE} seed2={order}"


@dataclass
class Times:
    """One restore, in ms: up to the VMM's API, up to the guest's first answer, up to the checked answer."""

    spawn: float
    load: float
    sweep: float
    demand: int

    @property
    def total(self) -> float:
        """Spawn to checked answer."""
        return self.spawn + self.load + self.sweep


class Bench:
    """The template, and one method a way."""

    def __init__(self, settings: Settings, template: Template) -> None:
        self.settings = settings
        self.template = template
        self.offsets = read_access_log(template.access_log, template.snapshot.memory_bytes).offsets
        self.ways: dict[str, Callable[[str], Awaitable[Times]]] = {
            "file": lambda command: self._restored("file", command, replay=False),
            "ours": lambda command: self._restored("uffd", command, replay=True),
            "on_demand": lambda command: self._restored("uffd", command, replay=False),
            "floor": self._floor,
            "c_loop": self._c_loop,
        }

    async def _restored(self, backend: str, command: str, *, replay: bool) -> Times:
        began = time.perf_counter()
        restored = await self._restore(backend, replay=replay)
        return await self._sweep(restored, command, began, 0.0)

    async def _floor(self, command: str) -> Times:
        began = time.perf_counter()
        restored = await self._restore("uffd", replay=False, resume=False)
        paused = time.perf_counter()
        assert isinstance(restored.pages, PageServer)
        assert restored.pages.regions is not None
        install(restored.vmm.pidfd, restored.vmm.pid, restored.pages.regions, self.template, self.offsets)
        subtract = time.perf_counter() - paused
        await restored.resume()
        await restored.ready()
        return await self._sweep(restored, command, began, subtract)

    async def _restore(self, backend: str, *, replay: bool, resume: bool = True) -> Restored:
        request = Request(
            f"build-bench-{secrets.token_hex(4)}",
            NAME,
            self.template.snapshot,
            "file" if backend == "file" else "uffd",
            self.template.access_log,
        )
        return await restore(request, replace(self.settings, prefetch_enabled=replay), resume=resume)

    async def _sweep(self, restored: Restored, command: str, began: float, subtract: float) -> Times:
        try:
            ready = time.perf_counter()
            check(await restored.ask(command, _ASK_SECONDS))
            done = time.perf_counter()
            demand = restored.pages.counters().faults if isinstance(restored.pages, PageServer) else 0
        finally:
            await finish(restored.close())
        spawn = restored.timings_ms["spawn"]
        return Times(spawn, (ready - began - subtract) * 1000 - spawn, (done - ready) * 1000, demand)

    async def _c_loop(self, command: str) -> Times:
        """The rival serves; everything else is as in a restore of ours."""
        with tempfile.TemporaryDirectory(prefix="vmd-bench-") as folder:
            socket = Path(folder, "pages.sock")
            memory = str(self.template.snapshot.memory)
            server = subprocess.Popen([build("cloop"), str(socket), memory], stdout=subprocess.PIPE)
            assert server.stdout is not None
            server.stdout.readline()
            began = time.perf_counter()
            vmm = await Vmm.spawn(find_firecracker(self.settings), Path(folder), "c-loop", dies_with_parent=True)
            try:
                spawned = time.perf_counter()
                await vmm.load(self.template.snapshot.vmstate, backend="Uffd", backend_path="pages.sock", resume=True)
                assert await vmm.console.ask("ping", _ASK_SECONDS) == "pong"
                ready = time.perf_counter()
                check(await vmm.console.ask(command, _ASK_SECONDS))
                done = time.perf_counter()
            finally:
                await vmm.kill()
                server.kill()
                server.communicate()
        return Times((spawned - began) * 1000, (ready - spawned) * 1000, (done - ready) * 1000, 0)


def check(answer: str) -> None:
    """The guest must have swept what it was asked to, and found no word wrong."""
    found = dict(re.findall(r"(\w+)=(\w+)", answer))
    if (found.get("pages"), found.get("wrong")) != (str(PAGES), "0"):
        raise SystemExit(f"bench: the guest answered {answer!r}")


def install(pidfd: int, pid: int, regions: Regions, template: Template, offsets: object) -> None:
    """Install the recorded pages through a copy of the VMM's own userfaultfd, while its guest is paused."""
    uffd = _borrow(pidfd, pid)
    with template.snapshot.memory.open("rb") as file, mmap.mmap(-1, regions.page_size) as staging:
        source = ctypes.addressof(ctypes.c_char.from_buffer(staging))
        for offset in offsets:  # type: ignore[attr-defined]
            page = regions.find_offset(offset)
            assert page is not None
            staging[:] = os.pread(file.fileno(), regions.page_size, offset)
            step = userfault.copy(uffd, regions.address(page), source, regions.page_size)
            assert step.outcome in (Outcome.DONE, Outcome.PRESENT), step
    os.close(uffd)


def _borrow(pidfd: int, pid: int) -> int:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if str(entry.readlink()) == "anon_inode:[userfaultfd]":
            libc = ctypes.CDLL(None, use_errno=True)
            fd = int(libc.syscall(438, pidfd, int(entry.name), 0))  # pidfd_getfd(2)
            if fd >= 0:
                return fd
    raise SystemExit(f"bench: no userfaultfd to be had from the VMM: {os.strerror(ctypes.get_errno())}")


async def prepare(settings: Settings) -> Template:
    """The template of W2, kept between runs, its memory file read into the page cache."""
    shape = Shape(MEM_MIB, start=sweep(1))
    try:
        template = templates.load(settings, NAME)
    except NotFound:
        template = await templates.build(settings, NAME, shape)
    if template.shape != shape or not template.access_log.exists():
        raise SystemExit(f"bench: {template.directory} is of another shape; remove it")
    with template.snapshot.memory.open("rb", buffering=0) as memory:
        while memory.read(8 << 20):
            pass
    return template


async def measure(settings: Settings, rounds: int) -> Samples:
    """One run of each way a round, each round beginning with another way."""
    bench = Bench(settings, await prepare(settings))
    samples = Samples("restore", workload="W2", mem_mib=MEM_MIB, pages=PAGES, recorded=len(bench.offsets))
    for number in range(rounds + 1):
        turn = number % len(WAYS)
        for way in WAYS[turn:] + WAYS[:turn]:
            times = await bench.ways[way](sweep(1 + number))
            if number == 0:
                continue  # fills caches
            for metric, value in (
                ("total_ms", times.total), ("spawn_ms", times.spawn), ("load_ms", times.load),
                ("sweep_ms", times.sweep), ("demand_pages", times.demand),
            ):  # fmt: skip
                samples.add(way, metric, value, number=number)
    return samples


def judge(samples: Samples) -> int:
    """Print the acceptance lines; 1 when one is not met."""
    file, ours, floor, c_loop = (samples.median(way, "total_ms") for way in ("file", "ours", "floor", "c_loop"))
    missed = samples.median("ours", "demand_pages") / PAGES
    bars = [
        ("(File - ours) / (File - floor)", (file - ours) / (file - floor), 0.75, ">="),
        ("ours / floor", ours / floor, 1.35, "<="),
        ("C loop, demand only / ours", c_loop / ours, 7.0, ">="),
        ("demand faults during replay / set", missed, 0.02, "<="),
    ]
    failed = 0
    for name, value, wanted, sense in bars:
        holds = value >= wanted if sense == ">=" else value <= wanted
        failed += not holds
        print(bar(name, value, holds, f"{sense} {wanted}"))
    print(f"ours / File: {ours / file:.3f} (below 1 is faster)")
    return min(failed, 1)


def main() -> int:
    """Measure, print, keep the samples. Exit code 1 when a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    refuse_debug_build()
    RESULTS.mkdir(parents=True, exist_ok=True)
    settings = replace(Settings.read(), state_dir=RESULTS / "state", core="native")
    samples = asyncio.run(measure(settings, rounds))
    print(samples.table(WAYS, METRICS))
    print(f"samples: {samples.save()}")
    return judge(samples)


if __name__ == "__main__":
    sys.exit(main())
