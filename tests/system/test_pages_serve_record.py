"""`vmd pages serve --record`: what the log says, when it is written, and what it never harms."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.vmm import FakeVmm, Span, eventually
from tests.system.pages_serve.command import MakeMemory, MakeVmm, PageServer, Serve
from tests.system.pages_serve.pages import HUGE, PAGE, identity, read_log

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd

CORES = pytest.mark.parametrize("core", ["native", "reference"])


@CORES
@pytest.mark.seed(27)
@pytest.mark.parametrize("pages", [8, 64, 65, 300])
def test_the_log_has_header_and_pages_in_first_touch_order(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, pages: int, core: str
) -> None:
    memory, log = make_memory(pages, holes=[3]), tmp_path / "access.log"
    server, vmm = serve_pages(memory, "--record", log, core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    order = random.Random(pages).sample(range(pages), 8)
    vmm.do("read", order)
    vmm.do("write", order[::-1])
    assert vmm.resident() == set(order)  # nothing beside
    vmm.kill()
    server.ends(0)
    keys, offsets = read_log(log)
    assert offsets == [page * PAGE for page in order]
    assert keys == {"memory": identity(memory), "page-size": str(PAGE), "pages": "8", "ended": "exited"}
    assert server.stderr() == ""


@pytest.mark.seed(27)
def test_offsets_are_those_of_the_file(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path
) -> None:
    memory, log = make_memory(40), tmp_path / "access.log"
    server, vmm = serve_pages(memory, "--record", log), make_vmm(memory, [Span(4, 30), Span(8, 2)])
    vmm.handshake(server.socket)
    vmm.do("read", [5, 1, 11])
    vmm.kill()
    server.ends(0)
    assert read_log(log)[1] == [3 * PAGE, 31 * PAGE, 9 * PAGE]


def test_a_page_that_is_removed_and_touched_again_is_logged_once(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path
) -> None:
    memory, log = make_memory(8), tmp_path / "access.log"
    server, vmm = serve_pages(memory, "--record", log), make_vmm(memory)
    vmm.handshake(server.socket)
    for _ in range(3):
        vmm.do("read", [6, 2])
        vmm.do("remove", [6])
    vmm.kill()
    server.ends(0)
    assert read_log(log)[1] == [6 * PAGE, 2 * PAGE]


def test_a_guest_of_huge_pages_has_the_identity_of_small_ones(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, huge_pages: None
) -> None:
    memory, log = make_memory(3, page_size=HUGE), tmp_path / "access.log"
    server, vmm = serve_pages(memory, "--record", log), make_vmm(memory, None, HUGE)
    vmm.handshake(server.socket)
    vmm.do("read", [2, 0])
    vmm.kill()
    server.ends(0)
    keys, offsets = read_log(log)
    assert offsets == [2 * HUGE, 0]
    assert (keys["memory"], keys["page-size"]) == (identity(memory), str(HUGE))


@CORES
@pytest.mark.seed(27)
def test_sigterm_writes_the_log(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, core: str
) -> None:
    memory, log = make_memory(8), tmp_path / "access.log"
    server, vmm = serve_pages(memory, "--record", log, core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    vmm.do("read", [4, 1])
    server.send(signal.SIGTERM)
    assert server.ends(0) < 0.5
    keys, offsets = read_log(log)
    assert (keys["ended"], offsets) == ("stopped", [4 * PAGE, PAGE])
    assert server.lines() == [f"vmd: warning: vmm {vmm.pid} left frozen; there is no journal to adopt it by"]


def test_an_old_log_stays_until_the_new_one_is_there(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    memory, log = make_memory(8), folder / "access.log"
    log.write_text("old")
    seen: set[str] = set()
    end = threading.Event()

    def watch() -> None:
        while not end.is_set():
            seen.add(log.read_text())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        server, vmm = serve_pages(memory, "--record", log), make_vmm(memory)
        vmm.handshake(server.socket)
        vmm.do("read", [4])
        assert log.read_text() == "old"
        vmm.kill()
        server.ends(0)
        eventually(lambda: log.read_text() in seen, "the new one was seen")
    finally:
        end.set()
        watcher.join()
    assert seen == {"old", log.read_text()}  # at every instant the one or the other, whole
    assert [path.name for path in folder.iterdir()] == ["access.log"]


@pytest.mark.parametrize("how", ["SIGTERM while waiting", "wrong handshake", "killed"])
def test_an_old_log_stays_where_nothing_was_recorded(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, how: str
) -> None:
    memory, log = make_memory(8), tmp_path / "access.log"
    log.write_text("old")
    server = serve_pages(memory, "--record", log)
    if how == "wrong handshake":
        make_vmm(memory).handshake(server.socket, [1])
        server.ends(1)
    else:
        server.send(signal.SIGTERM if how == "SIGTERM while waiting" else signal.SIGKILL)
        server.ends(0 if how == "SIGTERM while waiting" else -9)
        server.socket.unlink(missing_ok=True)
    assert log.read_text() == "old"
    assert [path.name for path in tmp_path.glob("*access.log*")] == ["access.log"]


def test_a_vm_that_touched_nothing_leaves_a_log_without_pages(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path
) -> None:
    memory, log = make_memory(8), tmp_path / "access.log"
    server, vmm = serve_pages(memory, "--record", log), make_vmm(memory)
    vmm.handshake(server.socket)
    server.when(state="serving")
    vmm.kill()
    server.ends(0)
    assert read_log(log) == ({**read_log(log)[0], "pages": "0"}, [])


@pytest.mark.parametrize(("where", "code"), [("no/such/log", 1), ("", 2), (".", 2)])
def test_a_log_that_cannot_be_written_is_told_at_the_start(
    serve_pages: Serve, make_memory: MakeMemory, tmp_path: Path, where: str, code: int
) -> None:
    server = serve_pages(make_memory(8), "--record", tmp_path / where, ready=False)
    server.refused("record", code=code)
    assert server.stdout() == ""


@pytest.mark.parametrize("option", ["--record", "--stats"])
def test_the_memory_is_never_written_over(serve_pages: Serve, make_memory: MakeMemory, option: str) -> None:
    memory = make_memory(8)
    content = memory.read_bytes()
    serve_pages(memory, option, memory, ready=False).refused(option, code=2)
    assert memory.read_bytes() == content


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, full."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], check=True)
    try:
        with (path / "filling").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(PAGE))
                except OSError:
                    break
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("end", ["SIGTERM", "exit"])
def test_a_full_disk_is_an_error_and_the_old_log_stays(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, small_disk: Path, end: str
) -> None:
    memory, log = make_memory(8), small_disk / "access.log"
    log.touch()
    server, vmm = serve_pages(memory, "--record", log), make_vmm(memory)
    vmm.handshake(server.socket)
    vmm.do("read", [4])
    if end == "exit":
        vmm.kill()
    else:
        server.send(signal.SIGTERM)
    server.ends(1)
    assert "No space left" in server.lines()[-1]
    assert "record" in server.lines()[-1]
    assert server.lines()[-1].startswith("vmd: error: ")
    if end == "SIGTERM":
        assert server.lines()[0].startswith(f"vmd: warning: vmm {vmm.pid} left frozen")
    assert len(server.lines()) == (2 if end == "SIGTERM" else 1)
    assert sorted(path.name for path in small_disk.iterdir()) == ["access.log", "filling"]
    assert log.stat().st_size == 0


def test_statistics_on_a_full_disk_are_warned_of_once_and_do_no_harm(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, small_disk: Path
) -> None:
    memory, stats = make_memory(8), small_disk / "stats.json"
    server, vmm = serve_pages(memory, "--stats", stats), make_vmm(memory)
    vmm.handshake(server.socket)
    assert vmm.verdicts() == ["image"] * 8
    for _ in range(3):
        server.send(signal.SIGUSR1)
    vmm.kill()
    server.ends(0)
    (line,) = server.lines()
    assert line.startswith("vmd: warning: stats ")
    assert "No space left" in line
    assert [path.name for path in small_disk.iterdir()] == ["filling"]


def sigterm_twice(server: PageServer) -> None:
    server.send(signal.SIGTERM)
    while not server.has_ended():
        os.kill(server.pid, signal.SIGTERM)


@pytest.mark.parametrize("number", range(5))
def test_more_signals_while_it_ends_change_nothing(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, number: int
) -> None:
    memory, log = make_memory(64), tmp_path / "access.log"
    server = serve_pages(memory, "--record", log)
    vmm: FakeVmm = make_vmm(memory)
    vmm.handshake(server.socket)
    vmm.do("read", range(number, 64))
    sigterm_twice(server)
    server.ends(0)
    assert len(read_log(log)[1]) == 64 - number
