"""The listener: private at once, polite to others, and gone without a trace."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from vmd import limits
from vmd.errors import Conflict, VmdError
from vmd.pages.listener import Listener, is_held

pytestmark = pytest.mark.seed(8)


@pytest.fixture
def path(run_dir: Path) -> Path:
    return run_dir / "pages.sock"


def connect(path: Path) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.connect(str(path))
    except OSError:
        peer.close()
        raise
    return peer


def leave_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o177])
def test_private_whatever_the_umask(path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        listener = Listener(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(path.stat().st_mode)
    listener.close()


def test_private_from_the_first_instant(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real_listen = socket.socket.listen

    def listen(self: socket.socket, backlog: int) -> None:
        seen.append((stat.S_IMODE(path.stat().st_mode), path.stat().st_uid, path.stat().st_gid))
        real_listen(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", listen)
    old = os.umask(0)
    try:
        Listener(path, owner=(os.getuid(), os.getgid())).close()
    finally:
        os.umask(old)
    assert seen == [(0o600, os.getuid(), os.getgid())]  # before anybody can connect


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_it_can_belong_to_another(path: Path) -> None:
    listener = Listener(path, owner=(1234, 5678))
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 5678, 0o600)
    listener.close()


def test_the_path_is_removed_at_the_end(path: Path) -> None:
    listener = Listener(path)
    listener.close()
    listener.close()
    assert not path.exists()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    leave_stale(path)
    listener = Listener(path)
    with connect(path):
        connection = listener.accept()
        assert connection is not None
        connection.close()
    listener.close()


def test_a_live_one_is_left_alone_and_not_connected_to(path: Path) -> None:
    first = Listener(path)
    before = path.stat()
    with pytest.raises(Conflict, match="in use"):
        Listener(path)
    assert (path.stat().st_dev, path.stat().st_ino) == (before.st_dev, before.st_ino)
    assert first.accept() is None  # nobody knocked
    first.close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_bound_is_live_though_it_does_not_listen(path: Path, kind: int) -> None:
    with socket.socket(socket.AF_UNIX, kind) as held:
        held.bind(str(path))
        with pytest.raises(Conflict, match="in use"):
            Listener(path)
    path.unlink()


def test_a_socket_that_still_serves_its_one_peer_is_live(path: Path) -> None:
    listener = Listener(path)
    with connect(path):
        served = listener.accept()
        listener.refuse_others()
        with pytest.raises(Conflict, match="in use"):
            Listener(path)
        assert served is not None
        served.close()
    listener.close()


def test_a_live_one_is_known_by_any_spelling(path: Path) -> None:
    first = Listener(path)
    (path.parent / "link").symlink_to(path.parent)
    for spelling in (path.parent / "link" / path.name, path.parent / "." / path.name):
        assert is_held(spelling)
        with pytest.raises(Conflict, match="in use"):
            Listener(spelling)
    assert not is_held(path.with_name("other.sock"))
    first.close()
    (path.parent / "link").unlink()


def test_a_relative_name_counts_as_live(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as held:
        held.bind(path.name)
        with pytest.raises(Conflict, match="in use"):
            Listener(path)
    path.unlink()


def test_a_name_with_a_space_in_it(path: Path) -> None:
    odd = path.with_name("two  words.sock")
    first = Listener(odd)
    with pytest.raises(Conflict, match="in use"):
        Listener(odd)
    first.close()


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo"])
def test_what_is_no_socket_is_left_alone(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        leave_stale(path.with_name("target"))
        path.symlink_to("target")
    else:
        os.mkfifo(path)
    before = path.lstat()
    with pytest.raises(Conflict, match="not a socket"):
        Listener(path)
    assert path.lstat() == before
    if kind == "directory":
        path.rmdir()
    else:
        path.unlink()
    path.with_name("target").unlink(missing_ok=True)


def test_a_path_that_is_too_long(run_dir: Path) -> None:
    path = run_dir / ("x" * limits.SOCKET_PATH_BYTES_MAX)
    with pytest.raises(VmdError, match=f"the kernel takes {limits.SOCKET_PATH_BYTES_MAX}"):
        Listener(path)


def test_the_longest_path(run_dir: Path) -> None:
    room = limits.SOCKET_PATH_BYTES_MAX - len(os.fsencode(run_dir)) - 1
    path = run_dir / ("x" * room)
    listener = Listener(path)
    connect(path).close()
    listener.close()
    assert not path.exists()


def test_a_short_relative_path_in_a_deep_directory(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = run_dir / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    listener = Listener("s")
    monkeypatch.chdir("/")
    assert (deep / "s").exists()
    listener.close()  # from wherever we are by then
    assert not (deep / "s").exists()


@pytest.mark.parametrize(("name", "says"), [("no/such/s", "No such file"), ("a\nb", "line feed")])
def test_what_cannot_be_bound_is_said(run_dir: Path, name: str, says: str) -> None:
    with pytest.raises(VmdError, match=says) as refused:
        Listener(run_dir / name)
    assert "\n" not in str(refused.value)


def test_others_are_refused_at_once_and_the_path_stays(path: Path) -> None:
    listener = Listener(path)
    waiting = connect(path)
    listener.refuse_others()
    with pytest.raises(ConnectionRefusedError):
        connect(path)
    with waiting, pytest.raises(ConnectionResetError):
        waiting.recv(1)
    assert path.exists()
    with pytest.raises(VmdError, match="no longer listening"):
        listener.fileno()
    listener.close()
    assert not path.exists()


def test_a_path_that_is_another_ones_by_now_is_not_removed(path: Path) -> None:
    listener = Listener(path)
    path.unlink()
    path.write_text("somebody else's")
    listener.close()
    assert path.read_text() == "somebody else's"
    path.unlink()


def test_many_start_at_once_on_a_stale_socket(path: Path) -> None:
    leave_stale(path)
    made: list[Listener] = []
    refused: list[Conflict] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait()
        try:
            made.append(Listener(path))
        except Conflict as conflict:
            refused.append(conflict)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 7)
    connect(path).close()  # and the one that won can be reached
    made[0].close()


# --- inherited ---------------------------------------------------------------------------------------


def test_a_listener_of_a_parent(path: Path) -> None:
    parent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    parent.bind(str(path))
    parent.listen()
    listener = Listener.from_fd(parent.detach(), path)
    assert not os.get_inheritable(listener.fileno())
    assert listener.accept() is None  # does not block
    with connect(path):
        connection = listener.accept()
        assert connection is not None
        connection.close()
    listener.close()
    assert not path.exists()


@pytest.mark.parametrize("kind", ["not listening", "datagram", "file", "closed"])
def test_what_is_no_listener_is_not_taken_over(path: Path, kind: str) -> None:
    if kind == "file":
        fd = os.open("/dev/null", os.O_RDONLY)
    elif kind == "closed":
        fd = os.open("/dev/null", os.O_RDONLY)
        os.close(fd)
    else:
        kinds = {"not listening": socket.SOCK_STREAM, "datagram": socket.SOCK_DGRAM}
        fd = socket.socket(socket.AF_UNIX, kinds[kind]).detach()
    with pytest.raises(VmdError, match=f"inherited descriptor {fd}"):
        Listener.from_fd(fd, path)
    if kind != "closed":
        os.close(fd)  # it has stayed the caller's
