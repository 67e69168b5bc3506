"""Who is at the other end: the process that connected, held by a pidfd that no other can inherit."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from pathlib import Path

from ..errors import HandshakeRefused

SO_PEERPIDFD = 77  # Linux 6.5; not in the socket module of Python 3.11
_CREDENTIALS = struct.Struct("iII")  # pid, uid, gid
# What SO_PEERPIDFD says of a peer that has been reaped, in different kernels.
_REAPED = (errno.ESRCH, errno.EINVAL, errno.ENODATA)
_START_TIME_FIELD = 22  # proc(5), counted from 1

GONE = -1


def identify(connection: socket.socket) -> tuple[int, int]:
    """The peer's pid and a pidfd of it, `GONE` when the process no longer exists.

    By SO_PEERPIDFD; before Linux 6.5 by SO_PEERCRED and pidfd_open(2), believed only when the
    process that holds the pid has the same start time before and after, not later than now, and the
    peer has not hung up: while it waited to be accepted it may have died, and its pid been given anew.
    Raises `HandshakeRefused` when the peer's pid cannot be seen from here.
    """
    pid = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    if pid <= 0:
        raise HandshakeRefused("handshake: the peer's process is in a pid namespace that is not visible from here")
    try:
        return pid, connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as failure:
        if failure.errno in _REAPED:
            return pid, GONE
        if failure.errno != errno.ENOPROTOOPT:
            raise HandshakeRefused(f"handshake: identify pid {pid}: {failure.strerror}") from failure
    pidfd = open_pidfd(pid, time.clock_gettime(time.CLOCK_BOOTTIME))
    if pidfd != GONE and _has_hung_up(connection):
        os.close(pidfd)
        return pid, GONE
    return pid, pidfd


def open_pidfd(pid: int, alive_at: float) -> int:
    """A pidfd of the process that had ``pid`` at ``alive_at`` (CLOCK_BOOTTIME, seconds), else `GONE`."""
    try:
        before = start_ticks(pid)
        pidfd = os.pidfd_open(pid)
    except OSError:
        return GONE
    try:
        same = start_ticks(pid) == before and before <= int(alive_at * os.sysconf("SC_CLK_TCK"))
    except OSError:
        same = False
    if not same:
        os.close(pidfd)
        return GONE
    return pidfd


def _has_hung_up(connection: socket.socket) -> bool:
    """Whether the peer's end is closed, as death closes it, at least for writing."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLRDHUP)  # POLLHUP is always reported
    return bool(poll.poll(0))


def start_ticks(pid: int) -> int:
    """When ``pid`` was started, clock ticks since boot (proc(5)). Raises OSError when there is no such process."""
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[_START_TIME_FIELD - 3])  # what is left begins with field 3


def has_exited(pidfd: int, seconds: float = 0.0) -> bool:
    """Whether the process of ``pidfd`` is dead, or will be within ``seconds``; `GONE` is."""
    if pidfd < 0:
        return True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
