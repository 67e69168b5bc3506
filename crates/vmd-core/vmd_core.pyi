"""The native page server of vmd. `vmd.pages.native` is its only caller."""

from typing import Literal, final

VERSION: str
"""Version of the core; vmd-sandbox refuses another than its own."""

PROFILE: str
"""``release`` or ``debug``; benches refuse to measure a debug build."""

@final
class Core:
    """Serves the page faults of one VM, in threads of its own that never take the GIL."""

    def __new__(
        cls,
        *,
        uffd: int,
        pidfd: int,
        image: int,
        regions: list[tuple[int, int, int]],
        page_size: int,
        beside: Literal["nothing", "record", "replay", "sequential"] | str,
        offsets: bytes,
        prefetch_bytes_max: int,
        fault_unserved_seconds: float,
        exit_wait_seconds: float,
        image_read_tries: int,
        poison_lines_max: int,
        memory_floor_percent: int,
        injections: list[tuple[str, str, int, int, int]],
    ) -> Core:
        """Take over three descriptors: userfaultfd (non-blocking), pidfd of the VMM, image.

        ``pidfd`` is -1 when the VMM has gone already. ``regions``: (host address, size, image
        offset) in bytes, already checked. ``offsets``: image offsets as native unsigned 64-bit
        integers, first-touch order. ``injections``: (op, outcome, count, after, errno), see
        `vmd.pages.contract.Injection`. Raises ValueError or OSError, and then the descriptors
        stay with the caller.
        """

    def start(self) -> None:
        """Begin to serve. Raises OSError when no thread can be made."""

    def stop(self) -> None:
        """Ask for the end. Returns at once; idempotent."""

    def join(self) -> tuple[str, str | None]:
        """Wait for the end, without the GIL: ("gone" | "stopped" | "failed", why it failed).

        The descriptors are closed by then; only the image stays open while a read of it does not
        return. Idempotent.
        """

    @property
    def ended_fd(self) -> int:
        """An eventfd that is readable from the end on; owned by this object."""

    def counters(self) -> dict[str, int | float | bool | None]:
        """The fields of `vmd.pages.contract.Counters`, at any time."""

    def touched(self) -> bytes:
        """Image offsets of the faulted pages as native unsigned 64-bit integers, first touch first."""

    def warnings(self) -> list[str]:
        """Take the lines that have gathered."""
