"""The native core: `vmd_core.Core` behind the contract. No page passes through Python."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any, Literal

import vmd_core

from .. import limits
from ..errors import PagesFailed
from .contract import Counters, Ended, EndReason, Service
from .handshake import Handshake
from .journal import Journal
from .source import Image
from .stats import ServedVm


class NativeCore:
    """See `contract.PageCore`. ``journal``: what another process can go on from."""

    name: Literal["native", "reference"] = "native"

    def __init__(self, handshake: Handshake, image: Image, service: Service, journal: Journal | None = None) -> None:
        # The VMM keeps its end of the connection open for its whole life; so do we.
        self._connection: Any = handshake.connection
        self._core = vmd_core.Core(
            uffd=handshake.uffd,
            pidfd=handshake.pidfd,
            journal=-1 if journal is None else journal.fd,
            seam=_seam(service),
            **journal_words(handshake, image, service),
        )
        handshake.close_descriptors()  # it has copies of its own
        image.close()

    @classmethod
    def adopt(cls, journal: Path, vmm_pid: int, service: Service = Service()) -> NativeCore | None:  # noqa: B008
        """A core that goes on with the VM of ``journal``; None when that VMM has exited meanwhile.

        Of ``service`` only what tests ask for counts: what to install stands in the journal. Raises
        `PagesFailed` for what cannot be adopted; nothing has been changed then.
        """
        self = cls.__new__(cls)
        self._connection = None
        try:
            core = vmd_core.Core.adopt(journal=journal, vmm_pid=vmm_pid, seam=_seam(service))
        except ValueError as refusal:
            raise PagesFailed(f"adopt: {refusal}") from refusal
        except OSError as failure:
            raise PagesFailed(f"adopt: {failure.strerror or failure}") from failure
        if core is None:
            return None
        self._core = core
        return self

    def served(self) -> ServedVm:
        """The VM that it serves."""
        return ServedVm(*self._core.vm())

    def pidfd(self) -> int:
        """A new pidfd of the VMM, for the caller to close; -1 when it had gone before there was one."""
        return self._core.pidfd()

    def kill(self) -> None:
        """For tests: stop dead. Returns at once."""
        self._core.kill()

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
        if self._connection is not None:
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


def journal_words(handshake: Handshake, image: Image, service: Service) -> dict[str, Any]:
    """What a VM's journal says of it, by the names that `vmd_core` knows it by."""
    return {
        "vmm_pid": handshake.vmm_pid,
        "image": image.fd,
        "image_path": os.fspath(image.path.absolute()),
        "regions": [(region.base, region.size, region.offset) for region in handshake.regions],
        "page_size": handshake.regions.page_size,
        "beside": service.beside.value,
        "offsets": service.offsets.tobytes(),
        "prefetch_bytes_max": service.prefetch_bytes_max,
        "limits": _core_limits(),
    }


def _core_limits() -> dict[str, float]:
    """The bounds that a core keeps, by the names that it knows them by."""
    return {
        "fault_unserved_seconds": limits.FAULT_UNSERVED_SECONDS_MAX,
        "exit_wait_seconds": limits.VMM_EXIT_SECONDS,
        "image_read_tries": limits.IMAGE_READ_TRIES,
        "poison_lines_max": limits.POISON_LINES_MAX,
        "memory_floor_percent": limits.PREFETCH_MEMORY_FLOOR_PERCENT,
    }


def _seam(service: Service) -> tuple[list[tuple[str, str, int, int, int]], tuple[str, int, bool] | None]:
    injections: list[tuple[str, str, int, int, int]] = [
        (i.op, i.outcome.value, i.count, i.after, i.errno) for i in service.injections
    ]
    death = service.death
    return injections, None if death is None else (death.point, death.after, death.real)
