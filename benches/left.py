"""What sandboxes and their pager could leave behind, counted before and after."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from vmd.pager.start import LOG, SOCKET
from vmd.settings import Settings

# The pager goes when it has had nothing to serve for half a second.
_QUIET_SECONDS = 5.0
_STEP_SECONDS = 0.02


def quiet(settings: Settings) -> None:
    """Wait until no pager runs any more, so that none is counted among what there was before."""
    deadline = time.monotonic() + _QUIET_SECONDS
    while (settings.run_dir / SOCKET).exists() and time.monotonic() < deadline:
        time.sleep(_STEP_SECONDS)


def left(settings: Settings, before: dict[str, int]) -> list[str]:
    """What there is more of than before, once the dying have died; empty when there is nothing."""
    deadline = time.monotonic() + _QUIET_SECONDS
    while (after := inventory(settings)) != before and time.monotonic() < deadline:
        time.sleep(_STEP_SECONDS)
    return [f"{after[kind] - count} {kind}" for kind, count in before.items() if after[kind] > count]


def inventory(settings: Settings) -> dict[str, int]:
    """How many of each kind of thing that a sandbox could leave there are, but for the pager's log, which stays."""
    return {
        "processes": len(processes(settings)),
        "fds": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": threading.active_count() + len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "sockets": Path("/proc/net/unix").read_text(errors="replace").count(str(settings.run_dir)),
        "files": sum(
            path.name != LOG for folder in (settings.run_dir, settings.state_dir) for path in folder.rglob("*")
        ),
    }


def processes(settings: Settings) -> list[int]:
    """Pids of all that were started for this run directory: VMMs have it in the environment, pagers as an argument."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if pid != os.getpid() and is_ours(settings, pid)]


def is_ours(settings: Settings, pid: int) -> bool:
    """Whether a living process was started for this run directory."""
    words = b""
    for name in ("environ", "cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            words += Path(f"/proc/{pid}/{name}").read_bytes()
    return os.fsencode(settings.run_dir) in words
