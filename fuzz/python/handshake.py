r"""A hostile VMM: bytes in pieces, with any descriptors, over a real socket.

An input is a row of pieces, each behind a mark and one byte: ``\xfe`` (never part of UTF-8), then which
descriptors come with the piece (their kind in the low two bits, their number above), then the piece.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from vmd import limits
from vmd.errors import HandshakeRefused
from vmd.pages import handshake, uffd
from vmd.pages.handshake import Handshake

from . import _line, memory_map
from .scanner import is_array_of_objects

MARK = b"\xfe"
IMAGE_BYTES = 1 << 30
BODY_BYTES_MAX = 2000  # the real limit is beyond the longest input
_PIECES_MAX = 64
_ALL = 63  # this number stands for all that a message can carry
_FDS_MAX = 253
_NAME_BYTES = 200
_KEYS = ("base_host_virt_addr", "size", "offset")


@dataclass(frozen=True)
class Piece:
    """One message of the peer."""

    kind: str
    count: int
    data: bytes


def run(data: bytes) -> None:
    """Believe exactly the handshakes that are good, refuse the others in one line, leave no descriptor open."""
    pieces = _pieces(data)
    with _descriptors() as descriptors, patch.object(limits, "HANDSHAKE_BODY_BYTES_MAX", BODY_BYTES_MAX):
        before = _open_descriptors()
        outcome = _converse(pieces, descriptors)
        _judge(outcome, _expected(pieces))
        assert _open_descriptors() == before


def _judge(outcome: Handshake | HandshakeRefused, expected: list[tuple[int, int, int]] | None) -> None:
    if isinstance(outcome, Handshake):
        assert expected is not None, "a bad handshake was believed"
        assert [(r.base, r.size, r.offset) for r in outcome.regions] == expected
        assert not os.get_blocking(outcome.uffd)
        outcome.close()
    else:
        assert expected is None, outcome
        assert str(outcome).startswith("handshake: ")
        _line.check(str(outcome), 300)


def _pieces(data: bytes) -> list[Piece]:
    found = []
    for part in data.split(MARK)[1 : 1 + _PIECES_MAX]:
        if len(part) > 1:
            count = part[0] >> 2
            kind = ("uffd", "eventfd", "null", "memfd")[part[0] & 3]
            found.append(Piece(kind, _FDS_MAX if count == _ALL else count, part[1:]))
    return found


class _Cut(socket.socket):
    """Reads at most to the end of a piece, so that the pieces arrive as such."""

    sizes: list[int]

    def recvmsg(self, size: int, *rest: int) -> Any:
        if not self.sizes:
            return super().recvmsg(size, *rest)
        got = super().recvmsg(min(size, self.sizes[0]), *rest)
        self.sizes[0] -= len(got[0])
        if not self.sizes[0]:
            del self.sizes[0]
        return got


def _converse(pieces: list[Piece], descriptors: dict[str, int]) -> Handshake | HandshakeRefused:
    ours, theirs = socket.socketpair()
    connection = _Cut(fileno=ours.detach())
    connection.sizes = [len(piece.data) for piece in pieces]
    connection.setblocking(False)
    with theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for piece in pieces:
            _send(theirs, piece, descriptors)
    try:
        outcome = handshake._converse(connection, IMAGE_BYTES, descriptors["stop"], math.inf)
    except HandshakeRefused as refused:
        return refused
    assert outcome is not None, "nobody asked it to stop"
    return outcome


def _send(peer: socket.socket, piece: Piece, descriptors: dict[str, int]) -> None:
    if piece.kind != "memfd":
        socket.send_fds(peer, [piece.data], [descriptors[piece.kind]] * piece.count)
        return
    fd = os.memfd_create(os.fsdecode(piece.data[:_NAME_BYTES].replace(b"\0", b"")))
    try:
        socket.send_fds(peer, [piece.data], [fd] * piece.count)
    finally:
        os.close(fd)


@contextmanager
def _descriptors() -> Iterator[dict[str, int]]:
    """One of each kind, to be sent as often as asked for; and the one that would say stop."""
    opened = {
        "uffd": uffd.create(),
        "eventfd": os.eventfd(0),
        "null": os.open("/dev/null", os.O_RDWR),
        "stop": os.eventfd(0),
    }
    try:
        yield opened
    finally:
        for fd in opened.values():
            os.close(fd)


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  (a hundred thousand times)


def _expected(pieces: list[Piece]) -> list[tuple[int, int, int]] | None:
    """The regions by address that a good handshake names; None when it is not good."""
    body = b"".join(piece.data for piece in pieces)
    kinds = [piece.kind for piece in pieces for _ in range(piece.count)]
    if kinds != ["uffd"] or pieces[0].count != 1 or len(body) > BODY_BYTES_MAX or not is_array_of_objects(body):
        return None
    items = json.loads(body)
    sizes = [item.get("page_size", item.get("page_size_kib")) for item in items]
    regions = [tuple(item.get(key) for key in _KEYS) for item in items]
    if not items or not all(type(number) is int for row in (sizes, *regions) for number in row):
        return None
    good = len(set(sizes)) == 1 and memory_map.is_good(regions, sizes[0], IMAGE_BYTES)
    return sorted(regions) if good else None
