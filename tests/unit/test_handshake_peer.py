"""Who connected: held by a pidfd, whichever way it was had, and never mistaken for another."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmd.errors import HandshakeRefused
from vmd.pages import peer
from vmd.pages.listener import Listener

CONNECT = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(flush=True); sys.stdin.read()
"""


@pytest.fixture
def caller(run_dir: Path) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A process that has connected to us and waits, and our end of the connection."""
    listener = Listener(run_dir / "s")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", CONNECT, str(run_dir / "s")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    connection = listener.accept()
    assert connection is not None
    listener.close()
    with connection, process:
        yield process, connection
        process.kill()


class OldKernel:
    """A connection as Linux 6.4 and older show it: without SO_PEERPIDFD; or one that answers it with an errno."""

    def __init__(self, connection: socket.socket, number: int = errno.ENOPROTOOPT) -> None:
        self._connection = connection
        self._errno = number

    def getsockopt(self, level: int, option: int, size: int = 0) -> int | bytes:
        if option == peer.SO_PEERPIDFD:
            raise OSError(self._errno, os.strerror(self._errno))
        return self._connection.getsockopt(level, option, size)

    def fileno(self) -> int:
        return self._connection.fileno()


@pytest.mark.parametrize("old", [False, True])
def test_the_process_that_connected(caller: tuple[subprocess.Popen[bytes], socket.socket], old: bool) -> None:
    process, connection = caller
    pid, pidfd = peer.identify(OldKernel(connection) if old else connection)  # type: ignore[arg-type]
    assert pid == process.pid
    assert not os.get_inheritable(pidfd)
    assert not peer.has_exited(pidfd)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert peer.has_exited(pidfd, 10)
    assert process.wait() == -signal.SIGKILL
    os.close(pidfd)


@pytest.mark.seed(16)
@pytest.mark.parametrize("number", [errno.ENOPROTOOPT, errno.ESRCH, errno.EINVAL, errno.ENODATA])
def test_a_peer_that_has_been_reaped(caller: tuple[subprocess.Popen[bytes], socket.socket], number: int) -> None:
    process, connection = caller
    process.kill()
    process.wait()
    pid, pidfd = peer.identify(OldKernel(connection, number))  # type: ignore[arg-type]
    assert (pid, pidfd) == (process.pid, peer.GONE)
    assert peer.has_exited(pidfd)


def test_a_peer_that_has_been_reaped_on_this_kernel(caller: tuple[subprocess.Popen[bytes], socket.socket]) -> None:
    process, connection = caller
    process.kill()
    process.wait()
    pid, pidfd = peer.identify(connection)
    assert pid == process.pid
    assert peer.has_exited(pidfd)
    if pidfd != peer.GONE:
        os.close(pidfd)


def test_any_other_errno_is_refused(caller: tuple[subprocess.Popen[bytes], socket.socket]) -> None:
    with pytest.raises(HandshakeRefused, match="Too many open files"):
        peer.identify(OldKernel(caller[1], errno.EMFILE))  # type: ignore[arg-type]


def test_a_pid_that_another_process_has_by_now_is_not_believed(
    caller: tuple[subprocess.Popen[bytes], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = caller[0].pid
    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert peer.open_pidfd(pid, 1.0) == peer.GONE  # it was started after that
    ticks = iter([100, 200])
    monkeypatch.setattr(peer, "start_ticks", lambda _: next(ticks))
    assert peer.open_pidfd(pid, now) == peer.GONE  # replaced between the two looks


def test_a_pid_given_anew_while_the_peer_waited_to_be_accepted_is_not_believed(
    caller: tuple[subprocess.Popen[bytes], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    process, connection = caller
    opened = os.pidfd_open
    process.kill()
    process.wait()
    with subprocess.Popen(["sleep", "60"]) as other:
        ticks = peer.start_ticks(other.pid)
        monkeypatch.setattr(peer, "start_ticks", lambda _: ticks)  # as though it had the dead one's pid
        monkeypatch.setattr(os, "pidfd_open", lambda _: opened(other.pid))
        try:
            assert peer.identify(OldKernel(connection)) == (process.pid, peer.GONE)  # type: ignore[arg-type]
        finally:
            other.kill()


def test_start_ticks_of_a_name_with_brackets(tmp_path: Path) -> None:
    script = tmp_path / "a) R 1 (b"
    script.symlink_to("/bin/sleep")
    with subprocess.Popen([str(script), "60"]) as process:
        ticks = peer.start_ticks(process.pid)
        now = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
        assert now - 60 * os.sysconf("SC_CLK_TCK") < ticks <= now + 1
        process.kill()


def test_a_pid_of_an_invisible_namespace_is_refused() -> None:
    class Foreign:
        def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:
            return bytes(size)

    with pytest.raises(HandshakeRefused, match="namespace"):
        peer.identify(Foreign())  # type: ignore[arg-type]
