"""`vmd pages serve --stats`: its keys, when it is written, and that it is never half of anything."""

from __future__ import annotations

import json
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vmm import FakeVmm, eventually
from tests.system.pages_serve.command import COUNTS, MakeMemory, MakeVmm, Serve, installed
from tests.system.pages_serve.pages import PAGE, log_of, write_log

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd

CORES = pytest.mark.parametrize("core", ["native", "reference"])
KEYS = {
    "schema", "core", "state", "vmm_pid", "page_size", "guest_bytes", "regions", *COUNTS, "bytes", "fault_us",
    "oldest_unserved_us", "replay", "cpu_us",
}  # fmt: skip


def check(stats: dict[str, Any]) -> None:
    """Keys, types, and what holds at every moment."""
    assert set(stats) == KEYS
    assert stats["schema"] == 1
    for key in (*COUNTS, "bytes", "cpu_us"):
        assert type(stats[key]) is int, key
        assert stats[key] >= 0, key
    assert set(stats["fault_us"]) == {"count", "p50", "p99", "max"}
    assert set(stats["replay"]) == {"pages", "skipped", "done", "refused"}
    assert type(stats["replay"]["done"]) is bool
    for key in ("pages", "skipped"):
        assert type(stats["replay"][key]) is int
    quantiles = [stats["fault_us"][key] for key in ("p50", "p99", "max")]
    if stats["fault_us"]["count"]:
        assert 0 < quantiles[0] <= quantiles[1] <= quantiles[2]
    else:
        assert quantiles == [None, None, None]
    sum_ = stats["demand"] + stats["replayed"] + stats["prefetched"] + stats["zero"]
    assert stats["bytes"] == sum_ * (stats["page_size"] or 0)


@CORES
def test_before_the_handshake(serve_pages: Serve, make_memory: MakeMemory, core: str) -> None:
    server = serve_pages(make_memory(8), core=core)
    stats = server.stats()
    check(stats)
    assert (stats["state"], stats["core"]) == ("waiting", core)
    assert [stats[key] for key in ("vmm_pid", "page_size", "guest_bytes", "regions")] == [None] * 4
    assert [stats[key] for key in COUNTS] == [0] * len(COUNTS)
    assert stats["replay"] == {"pages": 0, "skipped": 0, "done": False, "refused": None}
    assert stats["oldest_unserved_us"] is None
    server.send(signal.SIGTERM)
    server.ends(0)
    assert server.stats()["state"] == "ended"


@CORES
@pytest.mark.seed(49)
def test_while_serving_and_in_the_end(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(64, holes=[7])
    server, vmm = serve_pages(memory, "--no-prefetch", core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    vmm.do("read", range(20))
    vmm.do("remove", [3, 4, 40])
    vmm.do("read", [3])
    stats = server.fresh_stats()
    check(stats)
    assert stats["state"] == "serving"
    assert [stats[key] for key in ("vmm_pid", "page_size", "guest_bytes", "regions")] == [vmm.pid, PAGE, 64 * PAGE, 1]
    assert (stats["faults"], stats["demand"], stats["zero"], stats["removed"]) == (21, 19, 2, 2)
    assert (stats["replayed"], stats["prefetched"], stats["poisoned"]) == (0, 0, 0)
    assert installed(stats) == len(vmm.resident()) == 19
    assert stats["fault_us"]["count"] == 21
    assert stats["cpu_us"] > 0
    vmm.kill()
    server.ends(0)
    final = server.stats()
    check(final)
    assert final == {**stats, "state": "ended", "cpu_us": final["cpu_us"]}
    assert final["cpu_us"] >= stats["cpu_us"]


@CORES
def test_a_reader_never_sees_half_of_it(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(4096)
    server, vmm = serve_pages(memory, core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    job = vmm.start("read", range(4096), rounds=20)
    states: list[str] = []
    seen = 0
    until = time.monotonic() + 2
    while time.monotonic() < until:
        server.send(signal.SIGUSR1)
        stats = json.loads(server.stats_path.read_bytes())
        check(stats)
        seen += 1
        states += [stats["state"]] * (stats["state"] not in states[-1:])
    assert seen > 50
    assert states in (["waiting", "serving"], ["serving"])
    job.wait()
    vmm.kill()
    server.ends(0)
    assert server.stderr() == ""
    assert [path.name for path in server.stats_path.parent.glob("*stats*")] == ["stats.json"]
    assert list(server.stats_path.parent.glob(".*")) == []


def test_it_is_replaced_every_200_ms_while_serving(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm
) -> None:
    memory = make_memory(8)
    server, vmm = serve_pages(memory), make_vmm(memory)
    vmm.handshake(server.socket)
    server.when(state="serving")
    inodes = set()
    moments = []
    until = time.monotonic() + 3
    while time.monotonic() < until:
        status = server.stats_path.stat()
        if (status.st_ino, status.st_mtime_ns) not in inodes:
            inodes.add((status.st_ino, status.st_mtime_ns))
            moments.append(status.st_mtime_ns / 1e9)
    gaps = sorted(late - early for early, late in pairwise(moments))
    assert len(gaps) >= 10
    assert 0.15 < gaps[len(gaps) // 2] < 0.3


def test_sigusr1_writes_it_at_once_also_while_waiting(serve_pages: Serve, make_memory: MakeMemory) -> None:
    server = serve_pages(make_memory(8))
    server.stats_path.unlink()
    since = time.monotonic()
    server.send(signal.SIGUSR1)
    eventually(server.stats_path.exists, "it is there")
    assert time.monotonic() - since < 0.15
    assert server.stats()["state"] == "waiting"


def test_sigusr1_without_statistics_does_nothing(make_memory: MakeMemory, serve_pages: Serve) -> None:
    server = serve_pages(make_memory(8), "--stats", "/dev/null/none")
    server.send(signal.SIGUSR1)
    assert not server.has_ended(0.3)
    server.send(signal.SIGTERM)
    server.ends(0)


def test_a_directory_that_vanishes(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path
) -> None:
    folder = tmp_path / "stats"
    folder.mkdir()
    memory = make_memory(8)
    server, vmm = serve_pages(memory, "--stats", folder / "stats.json"), make_vmm(memory)
    vmm.handshake(server.socket)
    assert vmm.do("read", [1]) == ["ok"]
    folder.rename(tmp_path / "elsewhere")  # at once, where a removal may meet a file that is just being written
    eventually(server.lines, "a line")
    assert vmm.verdicts() == ["image"] * 8
    vmm.kill()
    server.ends(0)
    (line,) = server.lines()
    assert line.startswith("vmd: warning: stats ")
    assert not folder.exists()


@CORES
def test_the_oldest_fault_that_waits_is_told(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(64)
    server = serve_pages(memory, "--no-prefetch", core=core)
    vmm: FakeVmm = make_vmm(memory)
    vmm.handshake(server.socket)
    server.when(state="serving")
    storm = vmm.start("remove", [9], rounds=30_000, threads=2)
    reads = vmm.start("kernel_write", [1, 2, 9] * 100, threads=4)
    reads.wait(60)
    storm.wait(60)
    stats = server.fresh_stats()
    check(stats)
    assert stats["oldest_unserved_us"] is None
    assert stats["parked"] > 0
    vmm.kill()
    server.ends(0)


@CORES
def test_the_state_of_a_replay(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, core: str
) -> None:
    memory = make_memory(16)
    log = write_log(tmp_path / "log", [0, PAGE, 2 * PAGE], log_of(memory))
    server, vmm = serve_pages(memory, "--replay", log, core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    eventually(lambda: server.fresh_stats()["replay"]["done"], "done")
    check(server.stats())
    vmm.kill()
    server.ends(0)
    final = server.stats()
    check(final)
    assert final["replay"] == {"pages": 3, "skipped": 0, "done": True, "refused": None}


def test_a_refused_handshake_is_ended_in_the_statistics(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm
) -> None:
    memory = make_memory(8)
    server, vmm = serve_pages(memory), make_vmm(memory)
    vmm.handshake(server.socket, [1])
    server.ends(1)
    check(server.stats())
    assert server.stats()["state"] == "ended"
    assert server.stats()["vmm_pid"] is None
