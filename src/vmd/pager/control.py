"""Requests to the pager: one packet, one answer (`crates/vmd-core/src/pager/message.rs`)."""

from __future__ import annotations

import array
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from .. import limits
from ..errors import PagesFailed, TimedOut

_HEAD = struct.Struct("<4sHH")
_MAGIC, _VERSION = b"vmdp", 1
_SERVE, _PUBLISH, _STATUS, _UPGRADE, _REPLY = 1, 2, 3, 4, 5
_STATUS_WORD = struct.Struct("<Q")
_PACKET_BYTES_MAX = 1 << 16


class PagerGone(Exception):
    """The pager ended before it answered: what was asked for may have been done or not. Ask the next one."""


class Control:
    """A connection to the pager that listens at ``path``.

    Raises OSError where none does, `TimedOut` where one does and has no place in its backlog for too long.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # Not settimeout: with it a connect to a full backlog would not wait at all (unix(7)).
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(limits.PAGER_REPLY_SECONDS))
            self._socket.connect(str(path))
            self._socket.settimeout(limits.PAGER_REPLY_SECONDS)
        except BlockingIOError:
            self._socket.close()
            raise TimedOut(f"pager: no place in its backlog within {limits.PAGER_REPLY_SECONDS:g} s") from None
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def serve(self, name: str, journal: int, uffd: int, pidfd: int, image: int) -> None:
        """Have the VM of ``journal`` served under ``name``. The descriptors stay the caller's. Idempotent.

        Raises `PagesFailed` with the pager's words when it refuses, `PagerGone`, `TimedOut`.
        """
        self._ask(_SERVE, name, (journal, uffd, pidfd, image))

    def publish(self, name: str) -> None:
        """Have the CPU time of ``name`` brought up to date in its journal. Raises as `serve`."""
        self._ask(_PUBLISH, name)

    def status(self) -> str:
        """Lines ``pager PID``, ``standby PID ready|starting``, and ``vm NAME PID`` for each. Raises as `serve`."""
        return self._ask(_STATUS)

    def upgrade(self) -> None:
        """Hand all VMs over to a new pager, of the program as it is installed now. Returns when that is on its way.

        Raises `PagesFailed` when the new one does not start, and then the old one goes on; as `serve` otherwise.
        """
        self._ask(_UPGRADE)

    def _ask(self, kind: int, name: str = "", fds: Sequence[int] = ()) -> str:
        packet = _HEAD.pack(_MAGIC, _VERSION, kind) + name.encode()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([packet], ancillary)
            answer = self._socket.recv(_PACKET_BYTES_MAX)
        except TimeoutError:
            raise TimedOut(f"pager: no answer within {limits.PAGER_REPLY_SECONDS:g} s") from None
        except OSError as failure:
            raise PagerGone from failure
        if not answer:
            raise PagerGone
        return _read(answer)


def _timeval(seconds: float) -> bytes:
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))


def _read(answer: bytes) -> str:
    head = _HEAD.size + _STATUS_WORD.size
    if len(answer) < head or _HEAD.unpack_from(answer) != (_MAGIC, _VERSION, _REPLY):
        raise PagesFailed(f"pager: expected an answer of version {_VERSION}, got {answer[:16]!r}")
    refused = _STATUS_WORD.unpack_from(answer, _HEAD.size)[0]
    text = answer[head:].decode(errors="replace")
    if refused:
        raise PagesFailed(f"pager: {text}")
    return text
