"""The native core: `vmd_core.Core` behind the contract. No page passes through Python."""

from __future__ import annotations

from array import array
from typing import Any, Literal

import vmd_core

from .. import limits
from .contract import Counters, Ended, EndReason, Service
from .handshake import Handshake
from .source import Image


class NativeCore:
    """See `contract.PageCore`."""

    name: Literal["native", "reference"] = "native"

    def __init__(self, handshake: Handshake, image: Image, service: Service) -> None:
        # The VMM keeps its end of the connection open for its whole life; so do we.
        self._connection = handshake.connection
        self._core = vmd_core.Core(
            uffd=handshake.uffd,
            pidfd=handshake.pidfd,
            image=image.fd,
            regions=[(region.base, region.size, region.offset) for region in handshake.regions],
            page_size=handshake.regions.page_size,
            beside=service.beside.value,
            offsets=service.offsets.tobytes(),
            prefetch_bytes_max=service.prefetch_bytes_max,
            fault_unserved_seconds=limits.FAULT_UNSERVED_SECONDS_MAX,
            exit_wait_seconds=limits.VMM_EXIT_SECONDS,
            image_read_tries=limits.IMAGE_READ_TRIES,
            poison_lines_max=limits.POISON_LINES_MAX,
            memory_floor_percent=limits.PREFETCH_MEMORY_FLOOR_PERCENT,
            injections=[(i.op, i.outcome.value, i.count, i.after, i.errno) for i in service.injections],
        )
        handshake.uffd = handshake.pidfd = -1  # given away: the giver forgets
        image.detach()

    @property
    def ended_fd(self) -> int:
        """An eventfd, readable once the core has ended."""
        return self._core.ended_fd

    def start(self) -> None:
        """Begin to serve."""
        self._core.start()

    def stop(self) -> None:
        """Ask it to end. Returns at once; idempotent."""
        self._core.stop()

    def join(self) -> Ended:
        """Wait for the end, without the GIL. Idempotent."""
        reason, error = self._core.join()
        self._connection.close()
        return Ended(EndReason(reason), error)

    def counters(self) -> Counters:
        """Read the counters; at any time."""
        fields: dict[str, Any] = self._core.counters()
        return Counters(**fields)

    def touched(self) -> array[int]:
        """File offsets of the faulted pages, unique, first-touch order (RECORD)."""
        offsets = array("Q")
        offsets.frombytes(self._core.touched())
        return offsets

    def warnings(self) -> list[str]:
        """Take the lines gathered since the last call."""
        return self._core.warnings()
