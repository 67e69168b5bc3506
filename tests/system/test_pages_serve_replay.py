"""`vmd pages serve --replay`: whose log is used, what of it, and what becomes of the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.vmm import FakeVmm, Span, eventually
from tests.system.pages_serve.command import MakeMemory, MakeVmm, PageServer, Serve
from tests.system.pages_serve.pages import HUGE, PAGE, identity, log_of, write_log

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd

CORES = pytest.mark.parametrize("core", ["native", "reference"])


def offsets(*pages: int) -> list[int]:
    return [page * PAGE for page in pages]


def replayed(server: PageServer) -> None:
    eventually(lambda: server.fresh_stats()["replay"]["done"], "the replay is done")


def ends(server: PageServer, vmm: FakeVmm, lines: int = 0) -> None:
    vmm.kill()
    server.ends(0)
    assert server.stdout() == "ready\n"
    assert len(server.lines()) == lines
    assert all(line.startswith("vmd: warning: ") for line in server.lines())


@CORES
@pytest.mark.seed(22)
def test_the_recorded_pages_and_nothing_else(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, core: str
) -> None:
    memory = make_memory(64, holes=[5, 6])
    log = write_log(tmp_path / "log", offsets(40, 3, 5, 9, 10, 11), log_of(memory))
    server, vmm = serve_pages(memory, "--replay", log, core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    replayed(server)
    assert vmm.resident() == {40, 3, 5, 9, 10, 11}
    stats = server.fresh_stats()
    assert stats["replay"] == {"pages": 6, "skipped": 0, "done": True, "refused": None}
    assert (stats["replayed"], stats["zero"], stats["demand"], stats["faults"]) == (5, 1, 0, 0)
    assert vmm.verdicts() == ["zero" if page in (5, 6) else "image" for page in range(64)]
    assert server.fresh_stats()["demand"] == 57
    ends(server, vmm)


_BAD = [
    "junk",
    "4097",
    "-4096",
    "+4096",
    "4096.0",
    "0x1000",
    "64 128",
    str(64 * PAGE),
    str(1 << 64),
    "9" * 5000,
    "8192",
]


@CORES
@pytest.mark.seed(23)
def test_bad_lines_are_skipped_and_counted_in_one_warning(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, core: str
) -> None:
    memory = make_memory(64)
    lines = [*log_of(memory), "8192", *_BAD, "", "# a remark", "  12288  ", ""]
    log = tmp_path / "log"
    log.write_text("\n".join(lines))
    server, vmm = serve_pages(memory, "--replay", log, core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    replayed(server)
    assert vmm.resident() == {2, 3}
    assert server.stats()["replay"] == {"pages": 2, "skipped": len(_BAD), "done": True, "refused": None}
    assert str(len(_BAD)) in server.stderr()
    ends(server, vmm, lines=1)


def test_binary_junk_is_a_log_without_good_lines(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path
) -> None:
    memory, log = make_memory(8), tmp_path / "log"
    log.write_bytes(os.urandom(20000))
    server, vmm = serve_pages(memory, "--replay", log), make_vmm(memory)
    vmm.handshake(server.socket)
    assert vmm.verdicts() == ["image"] * 8
    ends(server, vmm, lines=1)


def _missing(log: Path, memory: Path) -> None:
    pass


def _directory(log: Path, memory: Path) -> None:
    log.mkdir()


def _fifo(log: Path, memory: Path) -> None:
    os.mkfifo(log)


def _other_memory(log: Path, memory: Path) -> None:
    write_log(log, offsets(1, 2), log_of(memory, memory=identity(memory)[:-1] + "0" + "x"))


def _touched(log: Path, memory: Path) -> None:
    write_log(log, offsets(1, 2), log_of(memory))
    os.utime(memory)


def _changed(log: Path, memory: Path) -> None:
    write_log(log, offsets(1, 2), log_of(memory))
    status = memory.stat()
    with memory.open("r+b") as file:
        file.write(b"another")
    os.utime(memory, ns=(status.st_atime_ns, status.st_mtime_ns))


def _newer_version(log: Path, memory: Path) -> None:
    write_log(log, offsets(1, 2), ["# vmd access-log 2", *log_of(memory)[1:]])


def _odd_page_size(log: Path, memory: Path) -> None:
    write_log(log, offsets(1, 2), ["# vmd access-log 1", "# page-size: 8192"])


@pytest.mark.seed(54)
@pytest.mark.parametrize(
    "spoil", [_missing, _directory, _fifo, _other_memory, _touched, _changed, _newer_version, _odd_page_size]
)
def test_a_log_that_cannot_be_used_is_warned_of_and_the_vm_served_on_demand(
    serve_pages: Serve,
    make_memory: MakeMemory,
    make_vmm: MakeVmm,
    tmp_path: Path,
    spoil: Callable[[Path, Path], None],
) -> None:
    memory, log = make_memory(32), tmp_path / "the log"
    spoil(log, memory)
    server, vmm = serve_pages(memory, "--replay", log), make_vmm(memory)
    (line,) = server.lines()
    assert line.startswith("vmd: warning: ")
    assert "the log" in line
    vmm.handshake(server.socket)
    stats = server.when(state="serving")
    assert stats["replay"]["refused"] in line
    assert vmm.do("read", [7]) == ["ok"]
    assert vmm.resident() == {7}  # neither replay nor prefetch
    assert vmm.verdicts() == ["image"] * 32
    stats = server.fresh_stats()
    assert (stats["replayed"], stats["prefetched"], stats["replay"]["done"]) == (0, 0, False)
    ends(server, vmm, lines=1)


def test_a_log_that_may_not_be_read(serve_pages: Serve, make_memory: MakeMemory, tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", offsets(1))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    server = serve_pages(make_memory(4), "--replay", loop)
    (line,) = server.lines()
    assert line.startswith("vmd: warning: ")
    assert log.exists()


@pytest.mark.parametrize("keys", [[], ["memory"], ["page-size"], ["ended"], ["snapshot"]])
def test_a_header_key_that_is_absent_is_not_compared(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, keys: list[str]
) -> None:
    memory = make_memory(32)
    header = log_of(memory, snapshot="0123456789abcdef") if keys else []
    left = [line for line in header if not any(f"# {key}:" in line for key in keys)]
    log = write_log(tmp_path / "log", offsets(9, 4), left)
    server, vmm = serve_pages(memory, "--replay", log), make_vmm(memory)
    vmm.handshake(server.socket)
    replayed(server)
    assert vmm.resident() == {4, 9}
    ends(server, vmm)


@CORES
def test_offsets_outside_all_regions_are_skipped(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, core: str
) -> None:
    memory = make_memory(64)
    log = write_log(tmp_path / "log", offsets(63, 50, 20, 0, 35, 10), log_of(memory))
    server = serve_pages(memory, "--replay", log, core=core)
    vmm = make_vmm(memory, [Span(8, 32), Span(4, 18)])  # pages 32..39 and 18..21 of the file
    vmm.handshake(server.socket)
    replayed(server)
    assert vmm.resident() == {3, 10}
    assert server.stats()["replay"]["pages"] == 2
    ends(server, vmm)


@CORES
@pytest.mark.seed(13)
def test_a_page_that_was_removed_meanwhile_is_not_installed(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, core: str
) -> None:
    pages = 4096
    memory = make_memory(pages)
    log = write_log(tmp_path / "log", offsets(*range(pages)), log_of(memory))
    server, vmm = serve_pages(memory, "--replay", log, core=core), make_vmm(memory)
    job = vmm.start("remove", range(0, pages, 2))  # waits for the server to read it, so replay comes after
    vmm.handshake(server.socket)
    assert set(job.wait()[0]) == {"ok"}
    replayed(server)
    resident = vmm.resident()
    assert resident.isdisjoint(range(0, pages, 2))
    stats = server.fresh_stats()
    assert stats["replayed"] + stats["demand"] - stats["removed"] == len(resident)
    assert vmm.verdicts() == ["zero", "image"] * (pages // 2)
    ends(server, vmm)


# --- page sizes --------------------------------------------------------------------------------------


@pytest.fixture
def vmm_of_huge_pages(huge_pages: None, make_vmm: MakeVmm) -> Callable[[Path], FakeVmm]:
    return lambda memory: make_vmm(memory, None, HUGE)


@CORES
@pytest.mark.seed(55)
def test_a_log_of_small_pages_for_a_guest_of_huge_ones(
    serve_pages: Serve,
    make_memory: MakeMemory,
    vmm_of_huge_pages: Callable[[Path], FakeVmm],
    tmp_path: Path,
    core: str,
) -> None:
    count = 6
    memory = make_memory(count, holes=[4], page_size=HUGE)
    recorded = [4 * HUGE + PAGE, 2 * HUGE + 5 * PAGE, 2 * HUGE, HUGE - PAGE, 4 * HUGE]
    log = write_log(tmp_path / "log", recorded, log_of(memory))
    server, vmm = serve_pages(memory, "--replay", log, core=core), vmm_of_huge_pages(memory)
    vmm.handshake(server.socket)
    replayed(server)
    stats = server.fresh_stats()
    assert (stats["page_size"], stats["guest_bytes"]) == (HUGE, count * HUGE)
    assert stats["replay"] == {"pages": 3, "skipped": 0, "done": True, "refused": None}
    assert (stats["replayed"], stats["zero"], stats["bytes"]) == (2, 1, 3 * HUGE)
    assert vmm.verdicts() == ["zero" if page == 4 else "image" for page in range(count)]
    assert server.fresh_stats()["demand"] == count - 3
    ends(server, vmm)


@CORES
@pytest.mark.seed(55)
def test_a_log_of_huge_pages_for_a_guest_of_small_ones(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, tmp_path: Path, core: str
) -> None:
    memory = make_memory(4 * 512)
    log = write_log(tmp_path / "log", [2 * HUGE, 0], log_of(memory, HUGE))
    server, vmm = serve_pages(memory, "--replay", log, core=core), make_vmm(memory)
    vmm.handshake(server.socket)
    replayed(server)
    assert vmm.resident() == {*range(1024, 1536), *range(512)}
    stats = server.fresh_stats()
    assert (stats["replay"]["pages"], stats["replayed"]) == (1024, 1024)
    ends(server, vmm)
