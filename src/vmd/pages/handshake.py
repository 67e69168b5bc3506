"""The handshake: a VMM connects, sends its userfaultfd and its memory map, and is believed or not.

::

    accept -> who is it (pidfd) -> first byte with exactly one descriptor -> body, in pieces -> map checked

Every end of it is one of four: a `Handshake`; None, because we were asked to stop; a peer that
went away before it was complete, which does not count (`PeerVanished`); or `HandshakeRefused`
with one line that says what was expected and what came. No descriptor outlives a refusal.
"""

from __future__ import annotations

import array
import json
import math
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import limits
from ..errors import HandshakeRefused, PeerVanished, TimedOut
from . import peer
from .jsonscan import ArrayScanner
from .listener import Listener
from .regions import Region, Regions

__all__ = ["Handshake", "Listener", "parse_regions", "receive"]

_UFFD_LINK = "anon_inode:[userfaultfd]"
# The kernel passes no more than this with one message (SCM_MAX_FD): room for all means that
# each one is seen, counted and closed.
_FDS_MAX = 253
_READ_BYTES = 1 << 16
_SHOWN_CHARS = 40


@dataclass
class Handshake:
    """A good handshake; owns its descriptors until a core takes them over or `close`.

    ``uffd`` is non-blocking. ``pidfd`` names the VMM; it is -1 when the VMM had been reaped
    before we could ask for it, and then a core ends at once with GONE.
    """

    uffd: int
    pidfd: int
    vmm_pid: int
    regions: Regions
    connection: socket.socket

    def close(self) -> None:
        """Close all descriptors, the userfaultfd first. Idempotent."""
        self.close_descriptors()
        self.connection.close()

    def close_descriptors(self) -> None:
        """Close userfaultfd and pidfd, of which a core has copies; the connection stays. Idempotent."""
        for fd in (self.uffd, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.uffd = self.pidfd = -1


def receive(
    listener: Listener,
    image_bytes: int,
    stop_fd: int,
    accept_seconds: float | None = None,
    retry: bool = True,
    warn: Callable[[str], None] = lambda line: None,
) -> Handshake | None:
    """Wait for a VMM with a good handshake; None as soon as ``stop_fd`` is readable.

    A peer that vanishes, or is not done within `limits.HANDSHAKE_PEER_SECONDS`, is warned of and
    the next one awaited; without ``retry`` its `PeerVanished` is raised. Raises `HandshakeRefused`
    for a wrong handshake, `TimedOut` after ``accept_seconds``, `VmdError` when accept fails.
    """
    deadline = math.inf if accept_seconds is None else time.monotonic() + accept_seconds
    while True:
        try:
            connection = _accept(listener, stop_fd, deadline)
            return None if connection is None else _converse(connection, image_bytes, stop_fd, deadline)
        except _PeerTimeUp as timeup:
            if time.monotonic() >= deadline:
                raise TimedOut(f"handshake: none within {accept_seconds:g} s") from None
            vanished: PeerVanished = timeup
        except PeerVanished as failure:
            vanished = failure
        if not retry:
            raise vanished
        warn(f"{vanished}; waiting for another")


class _PeerTimeUp(PeerVanished):
    """The peer's time, or the whole wait's, is up."""


class _StopError(Exception):
    """``stop_fd`` became readable."""


def _accept(listener: Listener, stop_fd: int, deadline: float) -> socket.socket | None:
    while True:
        try:
            _wait(listener.fileno(), (), stop_fd, deadline)
        except _StopError:
            return None
        connection = listener.accept()
        if connection is not None:
            return connection


def _converse(connection: socket.socket, image_bytes: int, stop_fd: int, deadline: float) -> Handshake | None:
    """Take one peer's handshake. Whatever it raises, nothing of the peer stays open."""
    talk = _Talk(connection, stop_fd, min(deadline, time.monotonic() + limits.HANDSHAKE_PEER_SECONDS))
    try:
        talk.pid, talk.pidfd = peer.identify(connection)
        return talk.run(image_bytes)
    except _StopError:
        talk.close()
        return None
    except BaseException:
        talk.close()
        raise


@dataclass
class _Talk:
    """The conversation with one peer: owns the connection and all that came over it."""

    connection: socket.socket
    stop_fd: int
    deadline: float
    pid: int = -1
    pidfd: int = peer.GONE
    fds: list[int] = field(default_factory=list)
    received: int = 0

    def run(self, image_bytes: int) -> Handshake:
        # One byte first: the descriptors of a message come with its first byte, so these are the
        # first message's. A longer read would also bring those of the message after it.
        scanner = ArrayScanner()
        data = self._read(1)
        self._check_descriptors()
        while True:
            try:
                scanner.feed(data)
            except ValueError as failure:
                raise HandshakeRefused(f"handshake: not a JSON array of objects: {failure}") from failure
            if scanner.complete and not self._has_more():
                break
            data = self._read(_READ_BYTES)
            if len(self.fds) > 1:
                raise HandshakeRefused("handshake: expected one descriptor, got more with a later message")
        regions = parse_regions(scanner.text, image_bytes)
        os.set_blocking(self.fds[0], False)
        return Handshake(self.fds.pop(), self.pidfd, self.pid, regions, self.connection)

    def close(self) -> None:
        for fd in (*self.fds, self.pidfd):
            if fd >= 0:
                os.close(fd)
        self.connection.close()

    def _check_descriptors(self) -> None:
        if len(self.fds) != 1:
            raise HandshakeRefused(f"handshake: expected one descriptor with the first message, got {len(self.fds)}")
        link = str(Path(f"/proc/self/fd/{self.fds[0]}").readlink())
        if link != _UFFD_LINK:
            raise HandshakeRefused(f"handshake: expected a userfaultfd, got {_shown(ascii(link)[1:-1])}")

    def _has_more(self) -> bool:
        """Whether bytes already wait behind the closing bracket; what a dead peer has sent counts too."""
        with suppress(OSError):
            return bool(self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        return False

    def _read(self, size: int) -> bytes:
        """The next bytes, descriptors put aside. Raises `PeerVanished` when there are none to come."""
        while True:
            exited = self._wait()
            try:
                data, controls, flags, _ = self.connection.recvmsg(
                    size, socket.CMSG_SPACE(_FDS_MAX * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                if exited:
                    raise self._vanished("died") from None
                continue
            except ConnectionError:
                raise self._vanished("disconnected") from None
            self._take(controls)
            if flags & socket.MSG_CTRUNC:
                raise HandshakeRefused("handshake: expected one descriptor, got more than could be received")
            if not data:
                raise self._vanished("disconnected")
            self._count(len(data))
            return data

    def _wait(self) -> bool:
        """Until there is something to read, or the peer has died: whether it has."""
        try:
            return self.pidfd in _wait(self.connection.fileno(), (self.pidfd,), self.stop_fd, self.deadline)
        except _PeerTimeUp:
            seconds = limits.HANDSHAKE_PEER_SECONDS
            raise _PeerTimeUp(
                f"handshake: peer pid {self.pid} was not done within {seconds:g} s ({self.received} bytes)"
            ) from None

    def _count(self, size: int) -> None:
        self.received += size
        if self.received > limits.HANDSHAKE_BODY_BYTES_MAX:
            raise HandshakeRefused(
                f"handshake: expected at most {limits.HANDSHAKE_BODY_BYTES_MAX} bytes, got {self.received} or more"
            )

    def _take(self, controls: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in controls:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                whole = array.array("i")
                whole.frombytes(data[: len(data) - len(data) % whole.itemsize])
                self.fds.extend(whole)

    def _vanished(self, how: str) -> PeerVanished:
        return PeerVanished(
            f"handshake: peer pid {self.pid} {how} before its handshake was complete ({self.received} bytes)"
        )


def _wait(fd: int, others: tuple[int, ...], stop_fd: int, deadline: float) -> set[int]:
    """Poll ``fd`` and ``others`` until one is readable: which. Raises `_StopError`, `_PeerTimeUp`."""
    poll = select.poll()
    for each in (fd, stop_fd, *others):
        if each >= 0:
            poll.register(each, select.POLLIN)
    left = deadline - time.monotonic()
    ready = {each for each, _ in poll.poll(None if left == math.inf else max(0, math.ceil(left * 1000)))}
    if stop_fd in ready:
        raise _StopError
    if not ready:
        raise _PeerTimeUp("handshake: time is up")
    return ready


def parse_regions(text: str, image_bytes: int) -> Regions:
    """The regions that a handshake's body names, checked against the image. Raises `HandshakeRefused`."""
    try:
        items = json.loads(text)
    except (ValueError, RecursionError) as failure:
        raise HandshakeRefused(f"handshake: not JSON that can be read: {_reason(failure)}") from failure
    if not items:
        raise HandshakeRefused("handshake: expected at least one region, got an empty array")
    regions = [
        Region(_number(item, at, "base_host_virt_addr"), _number(item, at, "size"), _number(item, at, "offset"))
        for at, item in enumerate(items)
    ]
    try:
        return Regions(regions, _page_size(items), image_bytes)
    except HandshakeRefused as refused:
        raise HandshakeRefused(f"handshake: {refused}") from refused


def _page_size(items: list[dict[str, Any]]) -> int:
    sizes = [
        # Firecracker's older key holds bytes, whatever its name says ("page_size_kib": 4096 means 4 KiB).
        _number(item, at, "page_size" if "page_size" in item else "page_size_kib")
        for at, item in enumerate(items)
    ]
    for at, size in enumerate(sizes):
        if size != sizes[0]:
            raise HandshakeRefused(f"handshake: region {at}: page size: expected {sizes[0]} as in region 0, got {size}")
    return sizes[0]


def _number(item: dict[str, Any], at: int, key: str) -> int:
    if key not in item:
        raise HandshakeRefused(f"handshake: region {at}: {key} is missing")
    value = item[key]
    if type(value) is not int or not 0 <= value < 1 << 64:  # a bool is an int to isinstance
        raise HandshakeRefused(
            f"handshake: region {at}: {key}: expected an integer from 0 to 2^64 - 1, got {_shown_value(value)}"
        )
    return value


def _shown_value(value: object) -> str:
    """A value of a peer, for a message: short, one line, and never a number too long to print."""
    if type(value) is int and value >= 1 << 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    return _shown(json.dumps(value))


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _reason(failure: Exception) -> str:
    if isinstance(failure, RecursionError):
        return "nested too deeply"
    return _shown(str(failure).splitlines()[0])
