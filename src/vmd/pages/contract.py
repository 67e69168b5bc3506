"""What a page core is: the one contract that the reference and the native server both keep.

A *core* serves one VM from a handshake that was good until the VMM is gone, it is stopped, or it
cannot go on. Everything before it (socket, handshake, checks) is shared Python; everything in it
is either slow and obvious (`reference`) or Rust (`native`), and the contract suite runs over both.

Page states, and all that moves a page between them::

                 install of image bytes, or of zeros where the image has a hole
        ABSENT ----------------------------------------------------> INSTALLED
          |  \\                                                       |   ^
          |   \\ image unreadable after retries                REMOVE |   | fault: zeros
          |    `-----------> POISONED --------------------.          v   |
          |                              REMOVE            `-----> REMOVED
          `-------------------------------------------------------->
                                         REMOVE

*Removed is sticky*: a page that was ever removed is only ever filled with zeros, because a fault
on an INSTALLED page is answered with zeros too (it can only be missing because it was removed).
INSTALLED is noted after the install, REMOVED before anything relies on it.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from .handshake import Handshake
from .source import Image


class PageState(enum.IntEnum):
    """Two bits a page."""

    ABSENT = 0
    INSTALLED = 1
    REMOVED = 2
    POISONED = 3


class Outcome(enum.StrEnum):
    """The named outcomes of an install, and the names of the injection seam."""

    DONE = "done"
    PARTIAL = "partial"  # some bytes, then EAGAIN or EEXIST
    PRESENT = "present"  # EEXIST: the page is there; still wake
    LATER = "later"  # EAGAIN: a REMOVE is pending; park, retry, never drop
    EDGE = "edge"  # ENOENT: no registered range here; clip, retry by page, ask the pidfd
    GONE = "gone"  # ESRCH: the VMM's address space is gone
    FATAL = "fatal"  # anything else


class Beside(enum.StrEnum):
    """What a core does beside demand faults."""

    NOTHING = "nothing"
    RECORD = "record"
    REPLAY = "replay"
    SEQUENTIAL = "sequential"


@dataclass(frozen=True, slots=True)
class Injection:
    """For tests: the ``count`` next installs by ``op`` end in ``outcome`` without a system call.

    ``op`` is ``copy``, ``zero`` or ``poison``; ``after`` installs of that kind pass first.
    ``errno`` refines FATAL.
    """

    op: Literal["copy", "zero", "poison"]
    outcome: Outcome
    count: int = 1
    after: int = 0
    errno: int = 0


@dataclass(frozen=True, slots=True)
class Death:
    """For tests of the native core: at its ``after``-th passing of ``point``, from 0, it dies as if by SIGKILL.

    ``real``: the process does; else the core's threads stop dead and nothing is noted, woken, killed.
    Points: ``read`` (messages are in the journal's ring), ``apply`` (applied), ``clear`` (ring cleared),
    ``intend`` (a demand page is about to be installed), ``install`` (it is in), ``note`` (noted), ``fill-intend``,
    ``fill-install``, ``fill-note``, and of a take-over ``adopt-apply`` (it begins), ``adopt-wake`` (before all
    waiters are woken), ``adopted``.
    """

    point: str
    after: int = 0
    real: bool = False


@dataclass(frozen=True, slots=True)
class Service:
    """What to do for one VM.

    ``offsets``: page-aligned byte offsets into the image in first-touch order (REPLAY only),
    already expanded or folded to the guest's page size, unique; those outside all regions are
    skipped by the core. ``skipped``: bad lines of the log; ``refused``: why a log was not used.
    ``prefetch_bytes_max``: bound of SEQUENTIAL, in bytes.
    """

    beside: Beside = Beside.NOTHING
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    skipped: int = 0
    refused: str | None = None
    prefetch_bytes_max: int = 0
    injections: Sequence[Injection] = ()
    death: Death | None = None


@dataclass(frozen=True, slots=True)
class Counters:
    """One reading of a core's counters; page counts in pages of the VM's page size.

    The keys of ``--stats`` (interfaces.md) with the same meaning; ``demand + replayed +
    prefetched + zero - removed`` is the number of pages resident in the VMM.
    """

    faults: int = 0
    demand: int = 0
    replayed: int = 0
    prefetched: int = 0
    zero: int = 0
    removed: int = 0
    poisoned: int = 0
    present: int = 0
    parked: int = 0
    fault_count: int = 0
    fault_p50_us: float | None = None
    fault_p99_us: float | None = None
    fault_max_us: float | None = None
    oldest_unserved_us: int | None = None
    replay_pages: int = 0
    replay_done: bool = False
    takeovers: int = 0
    cpu_us: int = 0


class EndReason(enum.StrEnum):
    """Why a core ended."""

    GONE = "gone"  # the VMM has exited
    STOPPED = "stopped"  # stop() was called; the VMM may be left frozen
    FAILED = "failed"  # the VM could not be served; it has been killed
    DIED = "died"  # by a test's order (`Death`)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a core ended; ``error`` says what and why when it FAILED."""

    reason: EndReason
    error: str | None = None


class PageCore(Protocol):
    """Serves the faults of one VM. Made by `cores.make_core`.

    Takes over the handshake's descriptors (userfaultfd, pidfd, connection) and the image, and
    closes them, last, in `join`. A pidfd of -1 means that the VMM has gone already.
    """

    name: Literal["native", "reference"]

    def __init__(self, handshake: Handshake, image: Image, service: Service) -> None: ...

    @property
    def ended_fd(self) -> int:
        """An eventfd, readable once the core has ended; owned by the core, valid until `join`."""
        ...

    def start(self) -> None:
        """Begin to serve. Call once."""

    def stop(self) -> None:
        """Ask it to end. Returns at once; idempotent; from any thread."""

    def join(self) -> Ended:
        """Wait for the end, free everything, say how it ended. Idempotent. Releases the GIL."""
        ...

    def counters(self) -> Counters:
        """Read the counters without stopping the core; also valid after `join`."""
        ...

    def touched(self) -> array[int]:
        """RECORD: file offsets of the faulted pages, unique, first-touch order."""
        ...

    def warnings(self) -> list[str]:
        """Take the lines gathered since the last call (unreadable pages, unknown events)."""
        ...
