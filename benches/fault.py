"""`make bench-fault`: a demand fault and bulk installs, against plain C.

Demand: a process that owns memory touches pages one by one in random order; it is served in turn
by a C loop (poll, read, pread, COPY) and by `vmd pages serve --no-prefetch` as shipped, without
and with a journal, each pinned to one CPU and the toucher to another. What the toucher sees, and the
server's CPU time.

Bulk: the sequential fallback of `vmd pages serve` against raw COPY in 1 MiB pieces from memory
that is mapped already. None is pinned.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .rivals import build
from .samples import Samples, bar, refuse_debug_build

VMD = str(Path(sys.prefix, "bin", "vmd"))
DEMAND_BYTES, BULK_BYTES = 256 << 20, 512 << 20
TOUCHES = 8192
WAYS = ("c", "vmd", "journal")
"""``journal``: vmd with a journal, as the pager has one of each VM."""


def main() -> int:
    """Measure, print, keep the samples. Exit code 1 when a bar is not met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    refuse_debug_build()
    samples = Samples("fault", touches=TOUCHES, bulk_bytes=BULK_BYTES)
    with tempfile.TemporaryDirectory(prefix="vmd-bench-") as folder:
        memory = Path(folder, "memory")
        _make_image(memory, BULK_BYTES)
        for number in range(rounds + 1):
            for way in WAYS if number % 2 else reversed(WAYS):
                _demand(samples, way, Path(folder), memory, number)
                _bulk(samples, way, Path(folder), memory, number)
    print(samples.table(WAYS, ("p50_us", "p99_us", "cpu_us", "bulk_gb_per_s")))
    print(f"samples: {samples.save()}")
    return _judge(samples)


def _judge(samples: Samples) -> int:
    met = True
    for way in WAYS[1:]:
        latency = samples.ratio("p50_us", way, "c")
        cpu = samples.ratio("cpu_us", way, "c")
        bulk = samples.ratio("bulk_gb_per_s", way, "c")
        bars = [
            (f"demand fault, p50 as the toucher sees it, {way} / C loop", latency, latency <= 1.10, "<= 1.10"),
            (f"demand fault, server CPU, {way} / C loop", cpu, cpu <= 1.10, "<= 1.10"),
            (f"bulk installs, {way} / raw COPY in 1 MiB pieces", bulk, bulk >= 0.90, ">= 0.90"),
        ]
        for name, value, holds, wanted in bars:
            print(bar(name, value, holds, wanted))
        met &= all(holds for _, _, holds, _ in bars)
    return 0 if met else 1


def _make_image(path: Path, size: int) -> None:
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(block)


def _demand(samples: Samples, way: str, folder: Path, memory: Path, number: int) -> None:
    socket = folder / "pages.sock"
    server = [build("cloop"), str(socket), str(memory)] if way == "c" else [*_vmd(way, socket, memory), "--no-prefetch"]
    with _serving(["taskset", "-c", "1", *server], socket):
        toucher = ["taskset", "-c", "0", build("toucher"), "touch", str(socket)]
        seen = _run([*toucher, str(DEMAND_BYTES), str(TOUCHES), str(number + 1)])
    if number:  # the round before the first fills caches
        samples.add(way, "p50_us", seen["p50_ns"] / 1000, number=number)
        samples.add(way, "p99_us", seen["p99_ns"] / 1000, number=number)
        samples.add(way, "cpu_us", seen["server_cpu_ns"] / 1000, number=number)


def _bulk(samples: Samples, way: str, folder: Path, memory: Path, number: int) -> None:
    if way == "c":
        seen = _run([build("toucher"), "raw", str(memory), str(BULK_BYTES)])
    else:
        socket = folder / "pages.sock"
        with _serving(_vmd(way, socket, memory), socket):
            seen = _run([build("toucher"), "bulk", str(socket), str(BULK_BYTES)])
    assert seen["missing"] == 0, seen
    if number:
        samples.add(way, "bulk_gb_per_s", seen["bytes"] / seen["ns"], number=number)


def _vmd(way: str, socket: Path, memory: Path) -> list[str]:
    command = [VMD, "pages", "serve", "--socket", str(socket), "--memory", str(memory)]
    return [*command, "--journal", f"/dev/shm/vmd-bench-{os.getpid()}.journal"] if way == "journal" else command


@contextmanager
def _serving(command: Sequence[str], socket: Path) -> Iterator[None]:
    """A page server from its ``ready`` on, until it ends with the VMM."""
    environment = os.environ | {"VMD_PREFETCH_MAX_BYTES": str(BULK_BYTES)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n", command
        yield
        server.wait(10)
    socket.unlink(missing_ok=True)


def _run(command: Sequence[str]) -> dict[str, int]:
    seen: dict[str, int] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return seen


if __name__ == "__main__":
    sys.exit(main())
