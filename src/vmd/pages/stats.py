"""The statistics object of ``--stats``, key by key as interfaces.md names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .contract import Counters

SCHEMA = 1

_COUNTS = ("faults", "demand", "replayed", "prefetched", "zero", "removed", "poisoned", "present", "parked")


@dataclass(frozen=True, slots=True)
class ServedVm:
    """What a report says of a VM beside its counters. ``skipped``, ``refused``: of the replay (`Service`)."""

    vmm_pid: int
    page_size: int
    guest_bytes: int
    regions: int
    skipped: int = 0
    refused: str | None = None


def report(core: str, state: str, vm: ServedVm | None, counters: Counters) -> dict[str, Any]:
    """Build the object. ``vm`` is None before the handshake."""
    page_size = vm.page_size if vm else None
    installed = counters.demand + counters.replayed + counters.prefetched + counters.zero
    return {
        "schema": SCHEMA,
        "core": core,
        "state": state,
        "vmm_pid": vm.vmm_pid if vm else None,
        "page_size": page_size,
        "guest_bytes": vm.guest_bytes if vm else None,
        "regions": vm.regions if vm else None,
        **{name: getattr(counters, name) for name in _COUNTS},
        "bytes": installed * (page_size or 0),
        "fault_us": {
            "count": counters.fault_count,
            "p50": counters.fault_p50_us,
            "p99": counters.fault_p99_us,
            "max": counters.fault_max_us,
        },
        "oldest_unserved_us": counters.oldest_unserved_us,
        "replay": {
            "pages": counters.replay_pages,
            "skipped": vm.skipped if vm else 0,
            "done": counters.replay_done,
            "refused": vm.refused if vm else None,
        },
        "cpu_us": counters.cpu_us,
    }
