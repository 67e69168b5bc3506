"""`vmd pages serve`, the start: what is checked, how the socket comes to be, what is said."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.system.pages_serve.command import VMD, MakeMemory, MakeVmm, Serve

pytest_plugins = ["tests.system.pages_serve.fixtures"]


def test_it_says_ready_and_nothing_else(serve_pages: Serve, make_memory: MakeMemory) -> None:
    server = serve_pages(make_memory(4))
    server.send(signal.SIGTERM)
    server.ends(0)
    assert server.stdout() == "ready\n"
    assert server.stderr() == ""


@pytest.mark.needs_uffd
@pytest.mark.parametrize("core", ["native", "reference"])
def test_ready_is_said_once_though_a_vm_is_served(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(4)
    server = serve_pages(memory, core=core)
    vmm = make_vmm(memory)
    vmm.handshake(server.socket)
    assert vmm.verdicts() == ["image"] * 4
    vmm.kill()
    server.ends(0)
    assert (server.stdout(), server.stderr()) == ("ready\n", "")


def test_it_listens_before_it_says_ready(serve_pages: Serve, make_memory: MakeMemory) -> None:
    server = serve_pages(make_memory(4))
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(server.socket))


# --- memory --------------------------------------------------------------------------------------


def _missing(path: Path) -> None:
    pass


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _empty(path: Path) -> None:
    path.touch()


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.seed(21)
@pytest.mark.parametrize(
    ("make", "why"),
    [(_missing, "No such file"), (Path.mkdir, "directory"), (_fifo, "FIFO"), (_device, "device"), (_empty, "empty")],
)
def test_memory_that_is_no_memory_is_refused(serve_pages: Serve, tmp_path: Path, make: object, why: str) -> None:
    path = tmp_path / "no memory"
    assert callable(make)
    make(path)
    server = serve_pages(path, ready=False)
    server.refused("no memory", why)
    assert not server.socket.exists()
    assert server.stdout() == ""


# --- the socket ----------------------------------------------------------------------------------


@pytest.mark.seed(8)
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
def test_the_socket_is_private_at_every_instant(serve_pages: Serve, make_memory: MakeMemory, umask: int) -> None:
    before = os.umask(umask)
    try:
        server = serve_pages(make_memory(1), ready=False)
    finally:
        os.umask(before)
    modes: set[int] = set()
    while server.stdout() == "" and not server.has_ended():
        try:
            modes.add(stat.S_IMODE(server.socket.lstat().st_mode))
        except FileNotFoundError:
            continue
    server.wait_ready()
    assert all(mode & ~0o600 == 0 for mode in modes), modes
    assert stat.S_IMODE(server.socket.lstat().st_mode) == 0o600
    assert stat.S_ISSOCK(server.socket.lstat().st_mode)


def test_the_socket_belongs_to_the_owner_that_was_asked_for(serve_pages: Serve, make_memory: MakeMemory) -> None:
    server = serve_pages(make_memory(1), "--owner", "12345:54321")
    status = server.socket.lstat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (12345, 54321, 0o600)


@pytest.mark.parametrize("word", ["root:root", "0", "1:", "-1:0", "99999999999:0", "0:4294967295", "²:0", ""])
def test_an_owner_that_is_none_is_a_usage_error(serve_pages: Serve, make_memory: MakeMemory, word: str) -> None:
    server = serve_pages(make_memory(1), "--owner", word, ready=False)
    server.refused("UID:GID", code=2)


@pytest.mark.seed(8)
def test_a_stale_socket_is_replaced(serve_pages: Serve, make_memory: MakeMemory, run_dir: Path) -> None:
    path = run_dir / "stale"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    inode = path.lstat().st_ino, path.lstat().st_mtime_ns
    server = serve_pages(make_memory(1), socket=path)
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) != inode
    assert server.stderr() == ""


def test_the_socket_of_a_server_that_was_killed_is_replaced(serve_pages: Serve, make_memory: MakeMemory) -> None:
    first = serve_pages(make_memory(1))
    first.process.kill()
    first.ends(-9)
    assert first.socket.is_socket()
    serve_pages(make_memory(1), socket=first.socket)


@pytest.fixture
def foreign(run_dir: Path) -> Iterator[tuple[Path, socket.socket]]:
    """A socket that another program is bound to, listening, its backlog empty."""
    path = run_dir / "foreign"
    with socket.socket(socket.AF_UNIX) as owner:
        owner.bind(str(path))
        owner.listen()
        owner.setblocking(False)
        yield path, owner
    path.unlink()


@pytest.mark.seed(8)
def test_a_live_socket_is_refused_and_not_connected_to(
    serve_pages: Serve, make_memory: MakeMemory, foreign: tuple[Path, socket.socket]
) -> None:
    path, owner = foreign
    inode = path.lstat().st_ino
    serve_pages(make_memory(1), socket=path, ready=False).refused("foreign", "in use")
    assert path.lstat().st_ino == inode
    with pytest.raises(BlockingIOError):
        owner.accept()


def test_a_socket_that_another_server_waits_at_is_refused(serve_pages: Serve, make_memory: MakeMemory) -> None:
    first = serve_pages(make_memory(1))
    serve_pages(make_memory(1), socket=first.socket, ready=False).refused("in use")
    first.send(signal.SIGTERM)
    first.ends(0)
    assert first.stderr() == ""


@pytest.mark.needs_uffd
@pytest.mark.parametrize("core", ["native", "reference"])
def test_a_socket_whose_vm_is_being_served_is_refused(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str
) -> None:
    memory = make_memory(4)
    first = serve_pages(memory, core=core)
    vmm = make_vmm(memory)
    vmm.handshake(first.socket)
    first.when(state="serving")
    serve_pages(memory, socket=first.socket, ready=False).refused("in use")
    assert vmm.verdicts() == ["image"] * 4


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "link"])
def test_what_is_no_socket_is_left_alone(
    serve_pages: Serve, make_memory: MakeMemory, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "not a socket"
    make: dict[str, Callable[[], object]] = {
        "file": lambda: path.write_text("precious"),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to("nowhere"),
    }
    make[kind]()
    before = path.lstat()
    serve_pages(make_memory(1), socket=path, ready=False).refused("not a socket", "not a socket$|not a socket;")
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)


def test_a_socket_path_that_cannot_be_is_refused(serve_pages: Serve, make_memory: MakeMemory, tmp_path: Path) -> None:
    serve_pages(make_memory(1), socket=tmp_path / "no" / "such", ready=False).refused("No such file")
    serve_pages(make_memory(1), socket=tmp_path / ("long" * 40), ready=False).refused("107")


def test_of_many_that_start_at_once_one_gets_the_socket(
    serve_pages: Serve, make_memory: MakeMemory, run_dir: Path
) -> None:
    memory, path = make_memory(1), run_dir / "wanted"
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(path))
    servers = [serve_pages(memory, socket=path, ready=False) for _ in range(6)]
    eventually(lambda: sum(server.has_ended() for server in servers) == 5, "five give up")
    (winner,) = (server for server in servers if not server.has_ended())
    winner.wait_ready()
    for server in servers:
        if server is not winner:
            server.refused("in use")
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))


# --- usage and standard streams --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ("--record", "log", "--replay", "log"),
        ("--record", "log", "--no-prefetch"),
        ("--replay", "log", "--no-prefetch"),
        ("--record", "log", "--replay", "log", "--no-prefetch"),
        ("--accept-timeout", "0"),
        ("--accept-timeout", "-1"),
        ("--accept-timeout", "soon"),
        ("--accept-timeout", "nan"),
        ("--no-such-option",),
        ("--journal", "log", "--stats", "log"),
    ],
)
def test_usage_errors(serve_pages: Serve, make_memory: MakeMemory, options: tuple[str, ...]) -> None:
    server = serve_pages(make_memory(1), *options, ready=False)
    server.refused(code=2)
    assert not server.socket.exists()


@pytest.mark.parametrize("given", [[], ["--socket", "/nowhere/s"], ["--memory", "/nowhere/m"]])
def test_socket_and_memory_must_be_given(given: list[str]) -> None:
    done = subprocess.run([VMD, "pages", "serve", *given], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vmd: error: ")
    assert done.stderr.count("\n") == 1


def test_adopt_without_a_journal() -> None:
    words = [VMD, "pages", "adopt", "--pid", "1", "--journal", "/nowhere/j"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vmd: error: adopt: journal /nowhere/j: No such file or directory\n"


def test_journal_needs_the_native_core(serve_pages: Serve, make_memory: MakeMemory, tmp_path: Path) -> None:
    server = serve_pages(make_memory(1), "--journal", str(tmp_path / "j"), core="reference", ready=False)
    server.refused("native core", code=2)
    assert not (tmp_path / "j").exists()


def test_help_names_every_option() -> None:
    text = subprocess.run([VMD, "pages", "serve", "--help"], capture_output=True, text=True, check=True).stdout
    options = ("socket", "memory", "record", "replay", "no-prefetch", "journal", "stats", "owner", "accept-timeout")
    assert [option for option in options if f"--{option}" not in text] == []


def test_the_core_is_checked_before_anything_else(serve_pages: Serve, make_memory: MakeMemory) -> None:
    serve_pages(make_memory(1), core="fast", ready=False).refused("VMD_CORE", code=2)


_CLOSED = {"stdout": ">&-", "stderr": "2>&-", "stdin": "<&-", "all": "<&- >&- 2>&-"}


@pytest.mark.parametrize("which", list(_CLOSED))
def test_a_standard_stream_may_be_closed(make_memory: MakeMemory, run_dir: Path, tmp_path: Path, which: str) -> None:
    path = run_dir / "socket"
    script = f'exec "$0" pages serve --socket "$1" --memory "$2" --accept-timeout 60 {_CLOSED[which]}'
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(["sh", "-c", script, VMD, path, make_memory(1)], stdout=out, stderr=err)
    try:
        eventually(path.is_socket, "it listens")
        eventually(lambda: _refuses(path) is False, "it accepts")
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "out").read_text() in ("", "ready\n")
    # A peer of ours came and went; that is all that may have been said.
    assert (tmp_path / "err").read_text().count("vmd: ") == len((tmp_path / "err").read_text().splitlines())
    assert not path.exists()


def _refuses(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as peer:
        try:
            peer.connect(str(path))
        except ConnectionRefusedError:
            return True
    return False


@pytest.mark.parametrize("sink", ["/dev/full", "broken pipe"])
def test_ready_that_cannot_be_said_is_an_error(make_memory: MakeMemory, run_dir: Path, sink: str) -> None:
    words = [VMD, "pages", "serve", "--socket", str(run_dir / "socket"), "--memory", str(make_memory(1))]
    reading, writing = os.pipe()
    os.close(reading)
    if sink == "/dev/full":
        os.close(writing)
        writing = os.open(sink, os.O_WRONLY)
    try:
        done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=20)
    finally:
        os.close(writing)
    assert done.returncode == 1
    assert done.stderr.startswith("vmd: error: ")
    assert done.stderr.count("\n") == 1
    assert not (run_dir / "socket").exists()


@pytest.mark.needs_uffd
def test_nobody_reads_what_it_says_and_the_vm_is_served_all_the_same(
    make_memory: MakeMemory, make_vmm: MakeVmm, run_dir: Path
) -> None:
    memory, path = make_memory(4), run_dir / "socket"
    words = [VMD, "pages", "serve", "--socket", str(path), "--memory", str(memory)]
    reading, writing = os.pipe()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=writing)
    os.close(writing)
    os.close(reading)
    try:
        eventually(path.is_socket, "it listens")
        eventually(lambda: not _refuses(path), "it accepts")  # a peer that vanishes: a warning that nobody reads
        vmm = make_vmm(memory)
        vmm.handshake(path)
        assert vmm.verdicts() == ["image"] * 4
        vmm.kill()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


# --- early signals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_before_or_at_ready_ends_it_well(
    serve_pages: Serve, make_memory: MakeMemory, number: signal.Signals
) -> None:
    memory = make_memory(1)
    for _ in range(8):
        server = serve_pages(memory, ready=False)
        while not server.socket.exists() and not server.has_ended():
            pass  # as early as the socket can be seen, which is before `ready`
        server.send(number)
        assert server.ends(0) < 0.5
        assert server.stderr() == ""
        assert not server.socket.exists()


def test_statistics_can_be_asked_for_as_soon_as_it_listens(serve_pages: Serve, make_memory: MakeMemory) -> None:
    server = serve_pages(make_memory(1), ready=False)
    while not server.socket.exists() and not server.has_ended():
        pass
    server.send(signal.SIGUSR1)
    server.wait_ready()
    assert server.fresh_stats()["state"] == "waiting"


def test_ready_is_not_held_back_by_a_pipe(make_memory: MakeMemory, run_dir: Path) -> None:
    words = [VMD, "pages", "serve", "--socket", str(run_dir / "socket"), "--memory", str(make_memory(1))]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        timer = threading.Timer(20, process.kill)
        timer.start()
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.stdout.read() == b""
        assert process.wait() == 0
        timer.cancel()
        timer.join()


def test_the_module_alone_does_not_serve() -> None:
    # What the command needs is loaded by the command, not by whoever imports the package.
    script = "import sys, vmd.cli; sys.exit('vmd.pages.server' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=20).returncode == 0
