"""The statistics object of ``--stats``, key by key as interfaces.md names them."""

from __future__ import annotations

from typing import Any

from .contract import Beside, Counters, Service
from .handshake import Handshake

SCHEMA = 1

_COUNTS = ("faults", "demand", "replayed", "prefetched", "zero", "removed", "poisoned", "present", "parked")


def report(
    core: str, state: str, handshake: Handshake | None, service: Service | None, counters: Counters
) -> dict[str, Any]:
    """Build the object. ``handshake`` and ``service`` are None before the handshake."""
    regions = handshake.regions if handshake else None
    page_size = regions.page_size if regions else None
    installed = counters.demand + counters.replayed + counters.prefetched + counters.zero
    return {
        "schema": SCHEMA,
        "core": core,
        "state": state,
        "vmm_pid": handshake.vmm_pid if handshake else None,
        "page_size": page_size,
        "guest_bytes": regions.guest_bytes if regions else None,
        "regions": len(regions) if regions else None,
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
            "skipped": service.skipped if service else 0,
            "done": bool(service and service.beside is Beside.REPLAY and counters.replay_done),
            "refused": service.refused if service else None,
        },
        "cpu_us": counters.cpu_us,
    }
