"""What can go wrong, as one tree; each class answers "what can the caller do?".

::

    VmdError                    something failed; the text says what and why        exit 1
    ├── UsageError              the request itself is wrong: change it               exit 2
    ├── NotFound                no such template, sandbox or file                    exit 3
    ├── Conflict                the present state forbids it: change the state       exit 4
    ├── BackendUnavailable      a breaker or a missing part rules this way out       exit 1
    ├── HandshakeRefused        a peer sent a handshake that is wrong: do not trust  exit 1
    │   └── PeerVanished        a peer went away or stayed silent: wait for another
    ├── PagesFailed             a page server cannot go on; its VM has been killed   exit 1
    ├── VmmError                the VMM said no, or died; its own words are kept     exit 1
    ├── SnapshotError           files of a snapshot are missing, torn or foreign     exit 1
    ├── RestoreFailed           one step of a restore failed; nothing is left        exit 1
    └── TimedOut                a bound of `limits` was reached; outcome unknown     exit 1

Messages are chains that read from intent to errno:
``restore sandbox s1: load snapshot t9: connect pages.sock: connection refused``.
"""

from __future__ import annotations


class VmdError(Exception):
    """Base of all errors that vmd raises on purpose.

    ``code`` is stable and machine-readable, ``hint`` names the fix where one is known.
    """

    code = "failed"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(VmdError):
    """The request is wrong in itself; it will never succeed unchanged."""

    code = "usage"
    exit_code = 2


class NotFound(VmdError):
    """Nothing of that name exists."""

    code = "not_found"
    exit_code = 3


class Conflict(VmdError):
    """The thing exists, but its present state forbids the request."""

    code = "conflict"
    exit_code = 4


class BackendUnavailable(VmdError):
    """The asked-for memory backend is out of service; ``hint`` says how to get it back."""

    code = "backend_unavailable"


class HandshakeRefused(VmdError):
    """A peer's handshake is wrong. The peer must not be served."""

    code = "handshake_refused"


class PeerVanished(HandshakeRefused):
    """A peer disconnected, died or stayed silent before its handshake was complete."""

    code = "peer_vanished"


class PagesFailed(VmdError):
    """A page server could not go on serving its VM."""

    code = "pages_failed"


class VmmError(VmdError):
    """Firecracker refused a request or ended; its own message is part of the text."""

    code = "vmm"


class SnapshotError(VmdError):
    """The files of a snapshot are missing, torn, or belong to another snapshot."""

    code = "snapshot"


class RestoreFailed(VmdError):
    """A step of a restore failed and everything that it had made has been removed."""

    code = "restore_failed"


class TimedOut(VmdError):
    """A bounded wait reached its bound; what the other side did is unknown."""

    code = "timed_out"
