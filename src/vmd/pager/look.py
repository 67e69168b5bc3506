"""What the journal of a VM says, whoever serves it and whether anybody does."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import VmdError
from ..pages.contract import Counters
from ..pages.stats import ServedVm, report

JOURNAL = "pages.journal"
"""The journal's name in a sandbox's run directory; the pager looks for it there."""

_ENDED = {0: None, 1: "gone", 2: "stopped", 3: "failed"}
_COUNTERS = tuple(field.name for field in dataclasses.fields(Counters))


@dataclass(frozen=True, slots=True)
class View:
    """One reading. ``ended``: gone, stopped, failed, or None; ``incident``: the last thing that went wrong."""

    vm: ServedVm
    counters: Counters
    server_pid: int
    ended: str | None
    incident: str | None

    def report(self, skipped: int = 0, refused: str | None = None) -> dict[str, Any]:
        """The object of ``--stats``, with how often the VM was taken over and what went wrong last."""
        state = "ended" if self.ended in ("gone", "failed") else "serving"
        vm = dataclasses.replace(self.vm, skipped=skipped, refused=refused)
        extra = {"takeovers": self.counters.takeovers, "incident": self.incident}
        return report("native", state, vm, self.counters) | extra


def read(path: Path) -> View:
    """Read a journal. Raises `VmdError` when it is not there, damaged, or without a VM."""
    import vmd_core  # an import of 5 ms that `vmd ls` without sandboxes does not need

    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as failure:
        raise VmdError(f"journal {path}: {failure.strerror}") from failure
    try:
        said: dict[str, Any] = vmd_core.read_journal(fd)
    except (OSError, ValueError) as failure:
        raise VmdError(f"journal {path}: {failure}") from failure
    finally:
        os.close(fd)
    vm = ServedVm(said["vmm_pid"], said["page_size"], said["guest_bytes"], said["regions"])
    counters = Counters(**{name: said[name] for name in _COUNTERS})
    return View(vm, counters, said["server_pid"], _ENDED.get(said["ended"]), said["incident"])


def is_served(path: Path) -> bool:
    """Whether a page server is alive on this journal: it keeps it locked. False where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
