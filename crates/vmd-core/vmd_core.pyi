"""The native page server of vmd. `vmd.pages` is its only caller."""

from os import PathLike
from typing import Literal, Never, final

VERSION: str
"""Version of the core; vmd-sandbox refuses another than its own."""

PROFILE: str
"""``release`` or ``debug``; benches refuse to measure a debug build."""

_Seam = tuple[list[tuple[str, str, int, int, int]], tuple[str, int, bool] | None]

@final
class Core:
    """Serves the page faults of one VM, in threads of its own that never take the GIL."""

    def __new__(
        cls,
        *,
        uffd: int,
        pidfd: int,
        vmm_pid: int,
        image: int,
        image_path: str,
        journal: int,
        regions: list[tuple[int, int, int]],
        page_size: int,
        beside: Literal["nothing", "record", "replay", "sequential"] | str,
        offsets: bytes,
        prefetch_bytes_max: int,
        limits: dict[str, float],
        seam: _Seam,
    ) -> Core:
        """Serve through copies of the descriptors given: userfaultfd (non-blocking), pidfd of the VMM, image, journal.

        ``pidfd`` is -1 when the VMM has gone already, ``journal`` where there is none; else its file is
        written anew. ``regions``: (host address, size, image offset) in bytes, already checked.
        ``offsets``: image offsets as native unsigned 64-bit integers, first-touch order. ``limits``: see
        `vmd.pages.native.journal_words`. ``seam``, for tests: (op, outcome, count, after, errno) of each
        `vmd.pages.contract.Injection`, and (point, after, real) of a `vmd.pages.contract.Death`. Raises
        ValueError or OSError.
        """

    @staticmethod
    def adopt(*, journal: str | PathLike[str], vmm_pid: int, seam: _Seam) -> Core | None:
        """Go on with the VM of this journal, which must be that of process ``vmm_pid``; None when that has exited.

        Raises ValueError with what was expected and what came, before anything is changed, or OSError.
        """

    def start(self) -> None:
        """Begin to serve. Raises OSError when no thread can be made."""

    def stop(self) -> None:
        """Ask for the end. Returns at once; idempotent."""

    def kill(self) -> None:
        """For tests: stop dead, as if the process were killed. Returns at once."""

    def join(self) -> tuple[str, str | None]:
        """Wait for the end, without the GIL: ("gone" | "stopped" | "failed" | "died", why it failed).

        The descriptors are closed by then; only the image stays open while a read of it does not
        return. Idempotent.
        """

    @property
    def ended_fd(self) -> int:
        """An eventfd that is readable from the end on; owned by this object."""

    def vm(self) -> tuple[int, int, int, int]:
        """The VMM's pid, page size, bytes of the guest, number of regions."""

    def pidfd(self) -> int:
        """A new pidfd of the VMM, for the caller to close; -1 when there is none, or serving has begun."""

    def counters(self) -> dict[str, int | float | bool | None]:
        """The fields of `vmd.pages.contract.Counters`, at any time."""

    def touched(self) -> bytes:
        """Image offsets of the faulted pages as native unsigned 64-bit integers, first touch first."""

    def warnings(self) -> list[str]:
        """Take the lines that have gathered."""

def pager_main(arguments: list[str]) -> Never:
    """Be the pager, or its standby, to the end of this process. `vmd.pager.start` writes the arguments."""

def write_journal(
    *,
    journal: int,
    image: int,
    image_path: str,
    vmm_pid: int,
    regions: list[tuple[int, int, int]],
    page_size: int,
    beside: str,
    offsets: bytes,
    prefetch_bytes_max: int,
    limits: dict[str, float],
) -> None:
    """Write, into the file of this descriptor, the journal of a VM that is to be served; see `Core`. Raises OSError."""

def write_waiting_journal(journal: int, image: int, image_path: str) -> None:
    """Write, into the file of this descriptor, a journal that waits for its VMM. Raises OSError."""

def read_journal(journal: int) -> dict[str, int | float | bool | bytes | str | None]:
    """What the journal in the file of this descriptor says, while it is served too.

    The fields of `vmd.pages.contract.Counters`, and ``vmm_pid``, ``vmm_start`` (clock ticks),
    ``page_size``, ``guest_bytes``, ``regions`` (number), ``image`` (path, bytes), ``server_pid``,
    ``ended`` (0 not, 1 gone, 2 stopped, 3 failed), ``incident`` (the last, or None). Raises
    ValueError for what is no journal, or none with a VM, and OSError.
    """
