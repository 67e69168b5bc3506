"""`vmd pages serve --journal`: when the file is made, whose it is, when it goes and when it stays."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from tests.fakes.vmm import FakeVmm
from tests.system.pages_serve.command import MakeJournalled, MakeMemory, MakeVmm, PageServer, Serve, serves
from vmd.host.filesystem import kind

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd


@pytest.fixture
def journal(run_dir: Path) -> Path:
    """Where a journal goes, on a tmpfs; not there yet."""
    return run_dir / "journal"


def test_it_is_made_at_the_start_private_and_removed_with_the_vmm(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, journal: Path
) -> None:
    memory = make_memory(8)
    umask = os.umask(0)
    try:
        server = serve_pages(memory, "--journal", journal)
    finally:
        os.umask(umask)
    status = journal.lstat()
    assert (stat.S_ISREG(status.st_mode), stat.S_IMODE(status.st_mode)) == (True, 0o600)
    vmm = make_vmm(memory)
    vmm.handshake(server.socket)
    serves(server, vmm)
    assert not journal.exists()


def identity(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_mode, status.st_ino, status.st_mtime_ns


def _full(path: Path) -> None:
    path.write_bytes(b"mine")


def _link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_full, _link, os.mkfifo, os.mkdir])
def test_what_is_there_already_is_refused_and_untouched(
    serve_pages: Serve, make_memory: MakeMemory, journal: Path, make: object
) -> None:
    make(journal)  # type: ignore[operator]
    before = identity(journal)
    server = serve_pages(make_memory(8), "--journal", journal, ready=False)
    server.refused(f"journal {journal}: it exists already, and is not reused")
    assert identity(journal) == before
    assert (server.stdout(), server.socket.exists()) == ("", False)
    if make is _full:
        assert journal.read_bytes() == b"mine"
    journal.rmdir() if journal.is_dir() else journal.unlink()


def test_elsewhere_than_on_a_tmpfs_it_works_with_a_warning(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, state_dir: Path
) -> None:
    assert kind(state_dir) != "tmpfs", "this test needs TMPDIR on a disk"
    journal, memory = state_dir / "journal", make_memory(8)
    server, vmm = serve_pages(memory, "--journal", journal), make_vmm(memory)
    (line,) = server.lines()
    assert line.startswith(f"vmd: warning: journal {journal}: it is on {kind(state_dir)}; it belongs on a tmpfs")
    vmm.handshake(server.socket)
    assert vmm.verdicts() == ["image"] * 8
    vmm.kill()
    server.ends(0)
    assert server.lines() == [line]
    assert not journal.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_it_stays_where_a_signal_leaves_a_vm_frozen(make_journalled: MakeJournalled, number: signal.Signals) -> None:
    world = make_journalled("--no-prefetch")
    inode = world.journal.stat().st_ino
    world.server.send(number)
    assert world.server.ends(0) < 0.5
    assert world.server.lines() == [world.frozen_line]
    assert (world.journal.stat().st_ino, stat.S_IMODE(world.journal.stat().st_mode)) == (inode, 0o600)
    assert not world.server.socket.exists()
    assert world.vmm.is_alive()


def _stop(server: PageServer, _: FakeVmm) -> None:
    server.send(signal.SIGTERM)
    server.ends(0)
    assert server.stderr() == ""


def _wait(server: PageServer, _: FakeVmm) -> None:
    server.refused("handshake: none within 0.5 s")


def _refuse(server: PageServer, vmm: FakeVmm) -> None:
    vmm.handshake(server.socket, [])
    server.refused("handshake: ")


@pytest.mark.parametrize("end", [_stop, _wait, _refuse])
def test_it_is_removed_where_there_never_was_a_vm(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, journal: Path, end: object
) -> None:
    memory = make_memory(8)
    options = ["--accept-timeout", "0.5"] if end is _wait else []
    vmm, server = make_vmm(memory), serve_pages(memory, "--journal", journal, *options)
    assert journal.exists() or end is _wait  # which may be over by now
    end(server, vmm)  # type: ignore[operator]
    assert not journal.exists()


def test_one_that_somebody_has_put_there_instead_is_left_alone(make_journalled: MakeJournalled) -> None:
    world = make_journalled()
    world.journal.unlink()
    world.journal.write_bytes(b"another's")
    world.vmm.kill()
    world.server.ends(0)
    assert world.journal.read_bytes() == b"another's"


def test_one_that_cannot_be_made_is_one_line(serve_pages: Serve, make_memory: MakeMemory, journal: Path) -> None:
    server = serve_pages(make_memory(8), "--journal", journal / "none", ready=False)
    server.refused(f"journal {journal}/none: No such file or directory")
    assert not server.socket.exists()


@pytest.mark.parametrize("same", ["--socket", "--memory", "--stats"])
def test_no_other_option_names_its_file(serve_pages: Serve, make_memory: MakeMemory, run_dir: Path, same: str) -> None:
    socket, memory, stats = run_dir / "s", make_memory(8), run_dir / "stats"
    journal = {"--socket": socket, "--memory": memory, "--stats": stats}[same]
    before = memory.read_bytes()
    server = serve_pages(memory, "--journal", journal, "--stats", stats, socket=socket, ready=False)
    server.refused(same, "--journal", "are the same file", code=2)
    assert memory.read_bytes() == before


def test_without_the_native_core_it_is_refused_with_the_fix(
    serve_pages: Serve, make_memory: MakeMemory, journal: Path
) -> None:
    server = serve_pages(make_memory(8), "--journal", journal, core="reference", ready=False)
    server.refused("--journal: needs the native core", "make develop", code=2)
    assert not journal.exists()
