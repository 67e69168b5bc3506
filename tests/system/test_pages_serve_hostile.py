"""`vmd pages serve` among hostile neighbours: what they do must cost nobody more than themselves."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fakes.vmm import Span, eventually
from tests.system.pages_serve.command import VMD, MakeMemory, MakeVmm, Serve
from tests.system.pages_serve.pages import PAGE, log_of, read_log, write_log
from tests.system.pages_serve.storage import SilentStorage

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd

CORES = pytest.mark.parametrize("core", ["native", "reference"])


@CORES
@pytest.mark.seed(15)
def test_a_fault_outside_the_announced_regions_fails_that_vm_with_its_map(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(16)
    server = serve_pages(memory, "--no-prefetch", core=core)
    vmm = make_vmm(memory, [Span(8, 0), Span(8, 8)])
    vmm.handshake(server.socket, vmm.body([0]))
    assert vmm.do("read", [7]) == ["ok"]
    with suppress(EOFError):  # it may be killed before it has told its driver that it begins
        vmm.start("read", [9])
    assert vmm.wait() == -signal.SIGKILL
    first = vmm.regions.ordered[0]
    server.refused(f"{vmm.regions.address(9):#x}", f"{first.base:#x}-{first.end:#x}")
    assert server.stats()["state"] == "ended"


@CORES
def test_descriptors_while_serving_are_those_that_serving_needs(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(16)
    server, vmm = serve_pages(memory, core=core), make_vmm(memory)
    for _ in range(5):
        vmm.connect(server.socket)
        vmm.send(b"[", "uffd")
        vmm.hang_up()
    eventually(lambda: len(server.lines()) == 5, "five lines")
    vmm.handshake(server.socket)
    assert vmm.verdicts() == ["image"] * 16
    found = server.descriptors()
    kinds = {
        "anon_inode:[userfaultfd]": 1,
        str(memory): 1,
        "socket": 1,  # the VMM's connection; the listener is closed
    }
    assert {kind: found.count(kind) for kind in kinds} == kinds
    assert sum("pidfd" in kind for kind in found) == 2  # the fault thread's and the main thread's
    vmm.kill()
    server.ends(0)


@CORES
def test_the_memory_file_may_lose_its_name(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(16)
    server, vmm = serve_pages(memory, "--no-prefetch", core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    memory.unlink()
    assert vmm.verdicts() == ["image"] * 16
    vmm.kill()
    server.ends(0)
    assert server.stderr() == ""


def test_a_socket_that_somebody_replaced_is_left_to_him(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm
) -> None:
    memory = make_memory(16)
    server, vmm = serve_pages(memory), make_vmm(memory)
    vmm.handshake(server.socket)
    server.when(state="serving")
    server.socket.unlink()
    server.socket.write_text("mine")
    vmm.kill()
    server.ends(0)
    assert server.stderr() == ""
    assert server.socket.read_text() == "mine"
    server.socket.unlink()


def test_a_directory_that_another_holds_locked_is_not_waited_for(
    serve_pages: Serve, make_memory: MakeMemory, run_dir: Path
) -> None:
    fd = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        server = serve_pages(make_memory(1), ready=False)
        server.ends(1, 10)
        assert "locked" in server.stderr()
    finally:
        os.close(fd)


def test_a_crowd_that_holds_the_queue_full_delays_a_vmm_and_no_more(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm
) -> None:
    memory = make_memory(16)
    server, vmm = serve_pages(memory), make_vmm(memory)
    end = threading.Event()

    def crowd() -> None:
        while not end.is_set():
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(1)
                try:
                    peer.connect(str(server.socket))
                except OSError as refused:
                    if refused.errno == errno.ECONNREFUSED:
                        return

    threads = [threading.Thread(target=crowd) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: len(server.lines()) > 100, "many came and went")
        vmm.handshake(server.socket)
        assert vmm.verdicts() == ["image"] * 16
    finally:
        end.set()
        for thread in threads:
            thread.join()
    vmm.kill()
    server.ends(0)
    assert all(line.startswith("vmd: warning: handshake: ") for line in server.lines())


@CORES
def test_eight_thousand_regions_are_replayed(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, core: str
) -> None:
    count = 8000
    memory = make_memory(count)
    log = write_log(tmp_path / "log", range(0, count * PAGE, PAGE), log_of(memory))
    server = serve_pages(memory, "--replay", log, core=core)
    vmm = make_vmm(memory, [Span(1, count - 1 - at) for at in range(count)])
    keys = ("base_host_virt_addr", "size", "offset", "page_size")
    vmm.handshake(server.socket, [{key: region[key] for key in keys} for region in vmm.body()])
    since = time.monotonic()
    eventually(lambda: server.fresh_stats()["replay"]["done"], "replayed")
    print("8000 regions replayed, s:", round(time.monotonic() - since, 2), server.stats()["cpu_us"])
    assert len(vmm.resident()) == count
    assert vmm.verdicts() == ["image"] * count
    vmm.kill()
    server.ends(0)


@CORES
@pytest.mark.seed(18)
def test_servers_side_by_side_serve_each_its_own(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    sets = []
    for number in range(4):
        memory = make_memory(256, holes=[number])
        sets.append((serve_pages(memory, core=core), make_vmm(memory), number))
    for server, vmm, _ in sets:
        vmm.handshake(server.socket)
    jobs = [vmm.start("verdict", range(256)) for _, vmm, _ in sets]
    for (server, vmm, number), job in zip(sets, jobs, strict=True):
        assert job.wait()[0] == ["zero" if page == number else "image" for page in range(256)]
        vmm.kill()
        server.ends(0)


@pytest.mark.parametrize("milliseconds", [150, 170, 180, 190, 200, 210, 230])
def test_sigterm_while_it_starts_leaves_nothing(serve_pages: Serve, make_memory: MakeMemory, milliseconds: int) -> None:
    server = serve_pages(make_memory(1), ready=False)
    assert not server.has_ended(milliseconds / 1000)
    server.send(signal.SIGTERM)
    assert server.has_ended(5)
    # Dead of it before there was anything, or well ended after; nothing between.
    assert server.process.wait() in (0, -signal.SIGTERM)
    assert server.stderr() == ""
    assert not server.socket.exists()


# --- storage that does not answer --------------------------------------------------------------------


@CORES
@pytest.mark.seed(17)
def test_sigterm_ends_it_in_time_though_the_storage_does_not_answer(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, core: str
) -> None:
    memory, log = make_memory(16), tmp_path / "access.log"
    vmm = make_vmm(memory)
    with SilentStorage(memory) as storage:
        server = serve_pages(memory, "--record", log, core=core, ready=False)
        for _ in range(16):  # for the identity
            storage.answer()
        server.wait_ready()
        vmm.handshake(server.socket)
        vmm.start("read", [5])
        storage.wait()
        server.send(signal.SIGTERM)
        assert server.ends(0) < 0.5
    assert server.lines()[-1] == f"vmd: warning: vmm {vmm.pid} left frozen; there is no journal to adopt it by"
    assert read_log(log)[1] == [5 * PAGE]
    assert server.stats()["state"] == "ended"
    assert not server.socket.exists()


@CORES
@pytest.mark.seed(16)
def test_it_does_not_outlive_its_vmm_though_the_storage_does_not_answer(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(16)
    vmm = make_vmm(memory)
    with SilentStorage(memory) as storage:
        server = serve_pages(memory, "--no-prefetch", core=core)
        vmm.handshake(server.socket)
        vmm.start("read", [5])
        storage.wait()
        vmm.kill()
        assert server.ends(0) < 3
    (line,) = server.lines()
    assert line == "vmd: warning: the page server's core does not end; leaving without it"
    assert not server.socket.exists()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@CORES
@pytest.mark.seed(26)
def test_replay_yields_to_a_fault_that_waits_for_storage_without_burning_a_cpu(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, core: str
) -> None:
    pages = 1 << 16
    memory = make_memory(pages, holes=range(pages - 1))
    log = write_log(tmp_path / "log", range(0, pages * PAGE, PAGE))
    vmm = make_vmm(memory)
    with SilentStorage(memory) as storage:
        server = serve_pages(memory, "--replay", log, core=core)
        vmm.start("read", [pages - 1])
        eventually(vmm.blocked, "it waits")
        vmm.handshake(server.socket)
        storage.wait()
        before = cpu_seconds(server.pid)
        assert not server.has_ended(1.0)
        assert cpu_seconds(server.pid) - before < 0.5
    eventually(lambda: server.fresh_stats()["replay"]["done"], "the replay goes on")
    assert len(vmm.resident()) == pages
    vmm.kill()
    server.ends(0)


# --- a reader of stderr that does not read -----------------------------------------------------------------


@CORES
@pytest.mark.seed(17)
def test_sigterm_ends_it_in_time_though_nobody_reads_what_it_says(
    make_memory: MakeMemory, make_vmm: MakeVmm, run_dir: Path, core: str
) -> None:
    memory, path = make_memory(64), run_dir / "s"
    reading, writing = os.pipe()
    words = [VMD, "pages", "serve", "--socket", str(path), "--memory", str(memory), "--no-prefetch"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=writing, env={**os.environ, "VMD_CORE": core}
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            os.set_blocking(writing, False)
            with suppress(BlockingIOError):
                while os.write(writing, bytes(1 << 16)):
                    pass
            os.set_blocking(writing, True)
            vmm = make_vmm(memory)
            vmm.handshake(path)
            os.truncate(memory, 32 * PAGE)
            assert set(vmm.do("kernel_read", range(32, 64))) == {"EFAULT"}  # ten lines and a count
            since = time.monotonic()
            process.terminate()
            assert process.wait(20) == 0
            assert time.monotonic() - since < 0.5
        finally:
            process.kill()
            os.close(reading)
            os.close(writing)
