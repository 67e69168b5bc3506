"""Nothing is left after a test: no thread, descriptor, process, mount or entry of the run directory.

An inventory is taken before and after; what is new and stays past a short grace is a leak. Processes
are found in two ways, since a detached VMM is no descendant any more and a jailed one has lost its
environment: by descent, and by the test's private directories in environment, arguments, working
directory or root.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 2.0
"""A process that was killed, or a thread that was told to end, may need this long on a busy host."""

_POLL_SECONDS = 0.01
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """One line of ``/proc/PID/stat``, as far as it matters here."""

    pid: int
    parent: int
    name: str
    zombie: bool
    started: float
    """Seconds since boot."""


def processes() -> dict[int, Process]:
    """All processes of the host by pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                text = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                name = text[text.index("(") + 1 : text.rindex(")")]
                rest = text[text.rindex(")") + 2 :].split()
                started = int(rest[19]) / _TICKS_PER_SECOND
                found[int(entry.name)] = Process(int(entry.name), int(rest[1]), name, rest[0] in "ZX", started)
    return found


def descendants(table: dict[int, Process], root: int) -> set[int]:
    """Pids of all living descendants of ``root``, at any depth."""
    children: dict[int, list[int]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    queue = [root]
    while queue:
        for pid in children.get(queue.pop(), []):
            if pid not in found:
                found.add(pid)
                queue.append(pid)
    return {pid for pid in found if not table[pid].zombie}


def mentions(pid: int, words: tuple[bytes, ...]) -> bool:
    """True when environment, arguments, working directory or root of ``pid`` holds one of ``words``."""
    parts = []
    for name in ("environ", "cmdline"):
        with contextlib.suppress(OSError):
            parts.append(Path(f"/proc/{pid}/{name}").read_bytes())
    for name in ("cwd", "root"):
        with contextlib.suppress(OSError):
            parts.append(os.fsencode(Path(f"/proc/{pid}/{name}").readlink()))
    return any(word in part for word in words for part in parts)


def owned(words: tuple[bytes, ...], since: float = 0.0) -> dict[int, str]:
    """Processes that descend from this one or mention ``words``: pid to name.

    ``since`` (seconds since boot) spares reading those that are older.
    """
    table = processes()
    family = descendants(table, os.getpid())
    return {
        pid: process.name
        for pid, process in table.items()
        if pid in family
        or (not process.zombie and pid != os.getpid() and process.started >= since and mentions(pid, words))
    }


def descriptors() -> Counter[str]:
    """Open descriptors of this process, counted by kind: ``socket``, ``pipe``, ``anon_inode:...`` or the path."""
    kinds: Counter[str] = Counter()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own descriptor is gone by now
            kinds[re.sub(r"^(socket|pipe):\[\d+\]$", r"\1", str(fd.readlink()))] += 1
    return kinds


def threads() -> dict[int, str]:
    """Threads of this process, native ones too: tid to name."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found[int(task.name)] = (task / "comm").read_text(encoding="utf-8").strip()
    return found


def mounts(words: tuple[bytes, ...]) -> list[str]:
    """Mount points whose path holds one of ``words``."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_bytes().splitlines()]
    return [os.fsdecode(point) for point in points if any(word in point for word in words)]


def entries(folder: Path) -> Iterator[str]:
    """What lies in ``folder``, at any depth, but for empty directories, lock files and the pager's log, which stays."""
    for path in sorted(folder.rglob("*")):
        if not path.name.endswith((".lock", "pager.log")) and (path.is_symlink() or not path.is_dir()):
            yield str(path.relative_to(folder))


class Watch:
    """Compares this process and its private directories with what they were when it was made."""

    def __init__(self, run_dir: Path, *folders: Path) -> None:
        self._run_dir = run_dir
        self._folders = (run_dir, *folders)
        self._words = tuple(os.fsencode(folder) for folder in self._folders)
        # One tick earlier: start times are rounded down to ticks.
        self._since = time.clock_gettime(time.CLOCK_BOOTTIME) - 2 / _TICKS_PER_SECOND
        self._processes = owned(self._words, self._since)
        self._threads = threads()
        self._descriptors = descriptors()

    def outside(self) -> list[str]:
        """New processes, mounts and entries of the run directory, one line each."""
        lines = [f"process {pid} ({name})" for pid, name in self._strays().items()]
        lines += [f"mount {point}" for point in mounts(self._words)]
        lines += [f"{self._run_dir}/{name}" for name in entries(self._run_dir)]
        return lines

    def leaks(self) -> list[str]:
        """What is new outside, and new threads and descriptors of this process."""
        lines = self.outside()
        lines += [f"thread {tid} ({name})" for tid, name in threads().items() if tid not in self._threads]
        lines += [f"{n} x descriptor {kind}" for kind, n in (descriptors() - self._descriptors).items()]
        return lines

    def settle(self, look: Callable[[], list[str]]) -> list[str]:
        """What ``look`` still sees after the grace; none as soon as it sees none."""
        if not look():
            return []
        gc.collect()  # what only a reference cycle keeps open is not held by anybody
        deadline = time.monotonic() + GRACE_SECONDS
        while (left := look()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return left

    def clean(self) -> None:
        """End what was left, so that one leak does not fail the tests that come after."""
        for pid in self._strays():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _strays(self) -> dict[int, str]:
        return {pid: name for pid, name in owned(self._words, self._since).items() if pid not in self._processes}
