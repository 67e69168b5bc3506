"""`vmd pages serve`, the end: with the VMM, by a signal, or because the memory cannot be served."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fakes.vmm import FakeVmm, eventually
from tests.system.pages_serve.command import MakeMemory, MakeVmm, PageServer, Serve, installed
from tests.system.pages_serve.machine import Frozen, MakeThawed, make_sparse
from tests.system.pages_serve.pages import PAGE, log_of, write_log

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = [pytest.mark.needs_kvm, pytest.mark.needs_uffd]

CORES = pytest.mark.parametrize("core", ["native", "reference"])
KILLS = 20


def lag(server: PageServer, pid: int) -> float:
    """SIGKILL a VMM: seconds from its exit to the server's."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    os.kill(pid, signal.SIGKILL)
    assert poll.poll(10_000)
    os.close(pidfd)
    return server.ends(0)


def assert_prompt(lags: list[float]) -> None:
    """All within 100 ms, but for one that the host may have held up."""
    assert sorted(lags)[-2] < 0.1, lags
    print("lags, ms:", " ".join(f"{1000 * lag:.1f}" for lag in sorted(lags)))


@CORES
@pytest.mark.seed(16)
def test_it_ends_within_100_ms_of_its_vmm(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, tmp_path: Path, core: str
) -> None:
    log = write_log(tmp_path / "log", range(0, frozen.pages * PAGE, PAGE), log_of(frozen.memory))
    modes: list[tuple[str | Path, ...]] = [("--no-prefetch",), ("--replay", log), (), ("--record", tmp_path / "rec")]
    lags = []
    for number in range(KILLS):
        server = serve_pages(frozen.memory, *modes[number % len(modes)], core=core)
        vmm = make_thawed()
        vmm.thaw(frozen, server.socket)
        vmm.send(b"check\n")  # in the middle of faults, and of replay or prefetch
        lags.append(lag(server, vmm.pid))
        assert (server.stdout(), server.stderr()) == ("ready\n", "")
        assert server.stats()["state"] == "ended"
        assert not server.socket.exists()
    assert_prompt(lags)


@CORES
@pytest.mark.seed(16)
def test_it_ends_within_100_ms_of_a_vmm_that_died_right_after_its_handshake(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(64)
    lags = []
    for _ in range(KILLS // 2):
        server, vmm = serve_pages(memory, core=core), make_vmm(memory)
        vmm.handshake(server.socket)
        lags.append(lag(server, vmm.pid))
        assert server.stderr() == ""
    assert_prompt(lags)


@CORES
@pytest.mark.parametrize("reaped", [False, True])
def test_a_vmm_that_was_dead_before_its_handshake_was_read(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str, reaped: bool
) -> None:
    memory = make_memory(8)
    server, vmm = serve_pages(memory, core=core), make_vmm(memory)
    server.send(signal.SIGSTOP)
    vmm.handshake(server.socket)
    vmm.kill()
    if reaped:
        vmm.wait()
    server.send(signal.SIGCONT)
    assert server.ends(0) < 2
    assert server.stderr() == ""
    assert server.stats()["vmm_pid"] == vmm.pid


@CORES
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("mode", ["demand", "prefetch"])
@pytest.mark.seed(17)
def test_a_signal_ends_it_within_500_ms(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str, number: signal.Signals, mode: str
) -> None:
    memory = make_memory(1 << 15)
    server = serve_pages(memory, *["--no-prefetch"] * (mode == "demand"), core=core)
    vmm = make_vmm(memory)
    vmm.handshake(server.socket)
    vmm.start("read", range(1 << 15), threads=2)
    server.when(state="serving")
    server.send(number)
    assert server.ends(0) < 0.5
    assert server.lines() == [f"vmd: warning: vmm {vmm.pid} left frozen; there is no journal to adopt it by"]
    assert server.stdout() == "ready\n"
    stats = server.stats()
    assert (stats["state"], stats["vmm_pid"]) == ("ended", vmm.pid)
    assert not server.socket.exists()
    assert vmm.is_alive()


@CORES
def test_a_signal_at_any_moment_of_the_handshake(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(8)
    served = 0
    for delay in range(12):
        server, vmm = serve_pages(memory, core=core), make_vmm(memory)
        vmm.handshake(server.socket)
        until = time.monotonic() + delay * 0.0007
        while time.monotonic() < until:
            pass
        server.send(signal.SIGTERM)
        assert server.ends(0) < 0.5
        if server.stats()["vmm_pid"] is not None:
            served += 1
            assert server.lines() == [f"vmd: warning: vmm {vmm.pid} left frozen; there is no journal to adopt it by"]
        assert not server.socket.exists()
        vmm.kill()
    assert served


def test_a_vmm_and_a_signal_that_end_it_at_once(serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm) -> None:
    memory = make_memory(8)
    for number in range(10):
        server, vmm = serve_pages(memory), make_vmm(memory)
        vmm.handshake(server.socket)
        server.when(state="serving")
        if number % 2:
            vmm.kill()
        server.send(signal.SIGTERM)
        vmm.kill()
        server.ends(0)
        assert len(server.lines()) <= 1


# --- pages that cannot be served ---------------------------------------------------------------------


def cut(memory: Path, pages: int) -> None:
    os.truncate(memory, pages * PAGE)


@CORES
@pytest.mark.seed(21)
@pytest.mark.parametrize("lost", [1, 10, 25])
def test_pages_of_a_truncated_image_are_named_and_poisoned(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str, lost: int
) -> None:
    memory = make_memory(64)
    server, vmm = serve_pages(memory, "--no-prefetch", core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    server.when(state="serving")
    cut(memory, 32)
    # The kernel's touch of a poisoned page is EFAULT; one by the VMM itself would be SIGBUS.
    assert vmm.do("kernel_read", range(32, 32 + lost)) == ["EFAULT"] * lost
    assert vmm.do("read", range(32)) == ["ok"] * 32  # serving goes on
    stats = server.fresh_stats()
    assert (stats["poisoned"], stats["demand"]) == (lost, 32)
    eventually(lambda: len(server.lines()) == min(lost, 10), "they are named")
    for number, line in enumerate(server.lines()):
        assert line.startswith("vmd: warning: ")
        assert f"{vmm.regions.address(32 + number):#x}" in line
        assert f"offset {(32 + number) * PAGE}" in line
    vmm.kill()
    server.ends(1)
    named = [line for line in server.lines() if "offset" in line]
    assert len(named) == min(lost, 10)
    assert server.lines()[-1].startswith(f"vmd: error: {lost} page")
    assert len([line for line in server.lines() if line.startswith("vmd: error: ")]) == 1


@CORES
@pytest.mark.seed(21)
def test_a_page_that_the_vmm_itself_touches_is_a_sigbus(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(64)
    server, vmm = serve_pages(memory, "--no-prefetch", core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    server.when(state="serving")
    cut(memory, 32)
    with suppress(EOFError):  # it may die before it has told its driver that it begins
        vmm.start("read", [40])
    assert vmm.wait() == -signal.SIGBUS
    server.ends(1)
    assert f"{vmm.regions.address(40):#x}" in server.stderr()


@CORES
@pytest.mark.seed(21)
@pytest.mark.parametrize("mode", ["prefetch", "replay"])
def test_replay_and_prefetch_leave_lost_pages_to_demand(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, core: str, mode: str
) -> None:
    pages = 1 << 15
    memory = make_memory(pages)
    log = write_log(tmp_path / "log", range(0, pages * PAGE, PAGE), log_of(memory))
    server = serve_pages(memory, *(("--replay", log) if mode == "replay" else ()), core=core)
    vmm = make_vmm(memory)
    vmm.handshake(server.socket)
    cut(memory, 16)  # long before they get to the end
    assert vmm.do("kernel_read", [0, pages - 1]) == ["ok", "EFAULT"]
    assert server.fresh_stats()["poisoned"] == 1  # those that nobody touches are nobody's loss
    vmm.kill()
    server.ends(1)
    assert [f"{vmm.regions.address(pages - 1):#x}" in line for line in server.lines()] == [True, False]


@CORES
def test_a_guest_whose_image_is_truncated_sees_no_wrong_word(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, tmp_path: Path, core: str
) -> None:
    memory = tmp_path / "memory"
    make_sparse(frozen.memory, memory)
    server = serve_pages(memory, "--no-prefetch", core=core)
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    cut(memory, frozen.pages // 2)
    vmm.send(b"check\n")
    eventually(lambda: server.fresh_stats()["poisoned"] or server.has_ended(), "a page is lost", 30)
    assert any("cannot be read" in line or "memory offset" in line for line in eventually(server.lines, "named"))
    with suppress(EOFError, TimeoutError):
        assert "wrong=" not in vmm.line(0.5)  # no answer that all is well, or that it is not
    vmm.process.kill()
    server.ends(1)
    assert len(server.lines()) <= 12


# --- the descriptor's mode -----------------------------------------------------------------------------


def assert_served(server: PageServer, vmm: FakeVmm, pages: int) -> None:
    assert vmm.verdicts() == ["image"] * pages
    assert vmm.tell("get_blocking") is False
    vmm.kill()
    server.ends(0)
    assert server.stderr() == ""


@CORES
@pytest.mark.parametrize("when", ["before", "during", "never"])
def test_the_userfaultfd_ends_up_non_blocking(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str, when: str
) -> None:
    memory = make_memory(64)
    server, vmm = serve_pages(memory, "--no-prefetch", core=core), make_vmm(memory)
    if when == "before":
        vmm.tell("set_blocking", blocking=True)
    vmm.handshake(server.socket)
    server.when(state="serving")
    if when == "during":
        assert vmm.do("read", [5]) == ["ok"]
        vmm.tell("set_blocking", blocking=True)
    assert_served(server, vmm, 64)


# --- storms ------------------------------------------------------------------------------------------


@CORES
@pytest.mark.seed(10, 11, 12, 13)
@pytest.mark.parametrize("options", [(), ("--no-prefetch",)], ids=["prefetch", "demand"])
def test_no_fault_is_lost_in_a_storm_of_removes(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str, options: tuple[str, ...]
) -> None:
    pages = 512
    memory = make_memory(pages)
    server, vmm = serve_pages(memory, *options, core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    jobs = [
        vmm.start("remove_32_pages", range(0, pages, 32), threads=2, rounds=10),
        vmm.start("read", range(pages), threads=3, rounds=3),
        vmm.start("kernel_write", range(0, pages, 7), threads=2, rounds=3),
    ]
    for job in jobs:
        assert {result for results in job.wait(60) for result in results} == {"ok"}
    vmm.do("remove_32_pages", range(0, pages, 32))
    assert vmm.verdicts() == ["zero"] * pages
    assert server.fresh_stats()["oldest_unserved_us"] is None
    vmm.kill()
    server.ends(0)
    assert server.stderr() == ""


@CORES
@pytest.mark.seed(49)
def test_lost_pages_do_not_disturb_the_counts(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(64)
    server, vmm = serve_pages(memory, "--no-prefetch", core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    server.when(state="serving")
    cut(memory, 32)
    lost = list(range(32, 64))
    for results in vmm.start("kernel_read", lost * 20, threads=6).wait():  # many wait for the same page
        assert set(results) == {"EFAULT"}
    vmm.do("remove", lost)
    stats = server.fresh_stats()
    assert (installed(stats), stats["poisoned"], stats["removed"]) == (0, 32, 0)
    assert vmm.verdicts(lost) == ["zero"] * 32  # given back, so nothing of them is lost any more
    assert installed(server.fresh_stats()) == len(vmm.resident()) == 32
    vmm.kill()
    server.ends(1)
