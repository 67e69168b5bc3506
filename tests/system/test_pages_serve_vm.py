"""`vmd pages serve` with a real Firecracker: every word right, and exactly the pages that it says it installed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vmm import eventually
from tests.guest.vmm import figures
from tests.system.pages_serve.command import PageServer, Serve, installed
from tests.system.pages_serve.machine import Frozen, MakeThawed, Thawed, make_sparse
from tests.system.pages_serve.pages import PAGE, cached_pages, evict, log_of, resident_pages, write_log

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = [pytest.mark.needs_kvm, pytest.mark.needs_uffd]

CORES = pytest.mark.parametrize("core", ["native", "reference"])


def adds_up(server: PageServer, vmm: Thawed, page_size: int = PAGE) -> dict[str, Any]:
    """At rest, what is installed by the statistics is what is resident by the page tables: the statistics."""

    def look() -> dict[str, Any] | None:
        stats = server.fresh_stats()
        # The guest polls its console and touches the same few pages; nothing is in flight for long.
        return stats if installed(stats) == len(resident_pages(vmm.pid, page_size)) else None

    return eventually(look, f"{installed(server.stats())} is {len(resident_pages(vmm.pid))} resident", 5)


def ends_with(server: PageServer, vmm: Thawed) -> None:
    vmm.process.kill()
    server.ends(0)
    assert (server.stdout(), server.stderr()) == ("ready\n", "")
    assert server.stats()["state"] == "ended"


@CORES
@pytest.mark.seed(1, 25, 49)
def test_on_demand_nothing_is_read_but_what_is_touched(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, core: str
) -> None:
    evict(frozen.memory)
    assert cached_pages(frozen.memory) == 0
    server = serve_pages(frozen.memory, "--no-prefetch", core=core)
    assert cached_pages(frozen.memory) == 0
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    cached = cached_pages(frozen.memory)
    assert 0 < cached < frozen.pages / 100
    assert vmm.ask("ping") == "pong"
    stats = adds_up(server, vmm)
    assert stats["replayed"] == stats["prefetched"] == stats["removed"] == stats["poisoned"] == 0
    assert stats["demand"] + stats["zero"] < frozen.pages / 100
    assert stats["core"] == core
    assert (stats["vmm_pid"], stats["page_size"], stats["regions"]) == (vmm.pid, PAGE, 1)
    assert stats["guest_bytes"] == frozen.pages * PAGE
    ends_with(server, vmm)


@pytest.mark.seed(1)
@pytest.mark.parametrize("mode", ["record", "replay"])
def test_identity_is_told_without_reading_the_memory(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, tmp_path: Path, mode: str
) -> None:
    log = tmp_path / "log"
    write_log(log, [0], log_of(frozen.memory))
    evict(frozen.memory)
    server = serve_pages(frozen.memory, f"--{mode}", log)
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    cached = cached_pages(frozen.memory)
    # 64 of the first 1 % are the sample.
    assert 0 < cached < frozen.pages / 100
    ends_with(server, vmm)


@CORES
@pytest.mark.seed(2, 49)
def test_on_demand_every_word_of_the_guest_is_right(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, core: str
) -> None:
    server = serve_pages(frozen.memory, "--no-prefetch", core=core)
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    assert vmm.is_right()
    stats = adds_up(server, vmm)
    assert stats["demand"] > frozen.pages / 2
    assert stats["zero"] > frozen.pages / 8  # the guest left a quarter of its heap unwritten: holes of the file
    assert stats["replayed"] == stats["prefetched"] == 0
    assert stats["fault_us"]["count"] >= stats["demand"] + stats["zero"]
    ends_with(server, vmm)


@CORES
@pytest.mark.seed(2, 24, 49)
def test_without_options_the_whole_memory_is_prefetched(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, core: str
) -> None:
    server = serve_pages(frozen.memory, core=core)
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    eventually(lambda: len(resident_pages(vmm.pid)) == frozen.pages, "all pages are in")
    stats = adds_up(server, vmm)
    assert stats["prefetched"] > frozen.pages / 2
    assert stats["replayed"] == 0
    assert stats["replay"] == {"pages": 0, "skipped": 0, "done": False, "refused": None}
    before = stats["faults"]
    assert vmm.is_right()
    assert server.fresh_stats()["faults"] == before
    ends_with(server, vmm)


@CORES
@pytest.mark.seed(2, 11)
def test_the_guest_checks_its_memory_while_it_is_prefetched(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, core: str
) -> None:
    server = serve_pages(frozen.memory, core=core)
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    assert vmm.is_right()
    adds_up(server, vmm)
    ends_with(server, vmm)


@CORES
@pytest.mark.seed(22, 27, 49)
def test_a_recorded_start_is_replayed(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, tmp_path: Path, core: str
) -> None:
    log = tmp_path / "access.log"
    server = serve_pages(frozen.memory, "--record", log, core=core)
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    assert figures(vmm.ask("sweep pages=2000 seed=3"))["wrong"] == 0
    recorded = adds_up(server, vmm)
    assert recorded["prefetched"] == recorded["replayed"] == 0
    assert not log.exists()
    ends_with(server, vmm)

    server = serve_pages(frozen.memory, "--replay", log, core=core)
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    eventually(lambda: server.fresh_stats()["replay"]["done"], "the replay is done")
    faults = server.stats()["faults"]
    assert figures(vmm.ask("sweep pages=2000 seed=3"))["wrong"] == 0
    stats = adds_up(server, vmm)
    assert stats["faults"] - faults < 20  # a page or two for what only the pause and the console touch
    assert stats["prefetched"] == 0
    assert stats["replay"]["pages"] == recorded["demand"] + recorded["zero"]
    assert vmm.is_right()
    adds_up(server, vmm)
    ends_with(server, vmm)


@pytest.mark.seed(24)
@CORES
def test_prefetch_is_bounded(serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, core: str) -> None:
    limit = 1000 * PAGE + 17
    server = serve_pages(frozen.memory, core=core, env={"VMD_PREFETCH_MAX_BYTES": str(limit)})
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    eventually(lambda: server.fresh_stats()["prefetched"] > 500, "most of it is in")
    stats = adds_up(server, vmm)
    assert stats["prefetched"] <= 1000
    assert stats["prefetched"] + stats["zero"] + stats["demand"] >= 1000
    assert vmm.is_right()
    ends_with(server, vmm)


@pytest.mark.parametrize("breaker", ["VMD_UFFD_ENABLED", "VMD_UFFD_PREFETCH_ENABLED"])
def test_the_breakers_do_not_act_here(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, breaker: str
) -> None:
    server = serve_pages(frozen.memory, env={breaker: "0"})
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    eventually(lambda: len(resident_pages(vmm.pid)) == frozen.pages, "all pages are in")
    ends_with(server, vmm)


def test_memory_on_a_tmpfs(serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, run_dir: Path) -> None:
    memory = run_dir / "memory"
    make_sparse(frozen.memory, memory)
    try:
        server = serve_pages(memory, "--no-prefetch")
        vmm = make_thawed()
        vmm.thaw(frozen, server.socket)
        assert vmm.is_right()
        assert adds_up(server, vmm)["zero"] > frozen.pages / 8
        ends_with(server, vmm)
    finally:
        memory.unlink()


@CORES
def test_a_dense_memory_file_is_served_alike(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, tmp_path: Path, core: str
) -> None:
    dense = tmp_path / "dense"
    dense.write_bytes(frozen.memory.read_bytes())
    server = serve_pages(dense, "--no-prefetch", core=core)
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    assert vmm.is_right()
    stats = adds_up(server, vmm)
    assert stats["zero"] == 0
    assert stats["demand"] > frozen.pages * 0.95
    ends_with(server, vmm)


def test_the_vmm_loads_before_it_runs_and_is_served_already(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed
) -> None:
    server = serve_pages(frozen.memory, "--no-prefetch")
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket, resume=False)
    loaded = server.fresh_stats()
    assert loaded["state"] == "serving"
    assert loaded["faults"] > 0
    vmm.call("PATCH", "/vm", state="Resumed")
    assert vmm.is_right()
    ends_with(server, vmm)


def test_it_is_stopped_and_the_vm_stays_frozen(serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed) -> None:
    server = serve_pages(frozen.memory, "--no-prefetch")
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    vmm.send(b"check\n")
    eventually(lambda: server.fresh_stats()["demand"] > 500, "it is at it")
    server.send(signal.SIGTERM)
    assert server.ends(0) < 0.5
    assert server.lines() == [f"vmd: warning: vmm {vmm.pid} left frozen; there is no journal to adopt it by"]
    stacks = [Path(f"/proc/{vmm.pid}/task/{task.name}/stack") for task in Path(f"/proc/{vmm.pid}/task").iterdir()]
    eventually(lambda: any("handle_userfault" in stack.read_text() for stack in stacks), "its vCPU waits")
    with pytest.raises(TimeoutError):  # no answer: neither zeros nor the end of the VM
        vmm.line(0.5)
    assert vmm.process.poll() is None
