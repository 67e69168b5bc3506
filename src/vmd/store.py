"""What is on disk: who owns a directory, whole files or none, and what dead owners left behind.

A directory that is still being made carries a file ``owner`` with a lock (flock(2)) that its maker
holds; the kernel drops the lock when the maker dies, however it dies. Whoever can take the lock
knows that nobody is coming back. `Registry` guards the moment between making a directory and
locking it: makers and sweepers of one parent take its lock for that moment.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import limits
from .errors import Conflict, VmdError
from .settings import Settings

OWNER = "owner"
RECORD = "sandbox.json"

# How the process of a detached page server was started; its run directory is in its order, as JSON.
_PAGES_MODULE = b"vmd.pages.detached"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace ``path`` by ``content`` in one step that a crash cannot halve: temporary, fsync, rename."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(name).rename(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in ``path``. Raises `FileNotFoundError`, or `VmdError` when it is no JSON object."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as broken:
        raise VmdError(f"{what}: {path}: not JSON: {broken}") from broken
    if not isinstance(content, dict):
        raise VmdError(f"{what}: {path}: expected an object")
    return content


def sync_directory(path: Path) -> None:
    """Make the names in ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Owned:
    """A directory that this process is making; the lock on its ``owner`` file says so.

    ``disown`` ends the making (the directory stays), ``discard`` removes the directory.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    def disown(self) -> None:
        """The directory is complete: remove the ``owner`` file and drop the lock. Idempotent."""
        if self._fd >= 0:
            (self.path / OWNER).unlink(missing_ok=True)
            self._release()

    def renamed(self, path: Path) -> None:
        """Take note that the directory was renamed by its owner."""
        self.path = path

    def discard(self) -> None:
        """Remove the directory with all that is in it, then drop the lock. Idempotent."""
        if self._fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            self._release()

    def _release(self) -> None:
        os.close(self._fd)
        self._fd = -1


class Registry:
    """A directory of directories: makes owned ones, finds those whose owner is dead."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the registry's lock: no other maker, sweeper or remover is at work. Short waits only."""
        self._make()
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def own(self, name: str) -> Owned:
        """Make the directory ``name`` and own it; call it `locked`. Raises `Conflict` when it exists."""
        path = self.path / name
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            raise Conflict(f"{path} exists") from None
        fd = os.open(path / OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)  # a sweeper that looks from outside may hold it for a moment
        return Owned(path, fd)

    def take_over_dead(self) -> list[Owned]:
        """Own every directory whose owner is dead, so that it can be cleaned up in peace; call it `locked`."""
        locks = ((entry, _lock_of_dead(entry)) for entry in self.entries())
        return [Owned(entry, fd) for entry, fd in locks if fd is not None]

    def entries(self) -> list[Path]:
        """The directories in it, sorted by name; empty when the registry does not exist."""
        try:
            return sorted(entry for entry in self.path.iterdir() if entry.is_dir())
        except FileNotFoundError:
            return []

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o755)
        except OSError as failure:
            raise VmdError(f"create {self.path}: {failure.strerror}") from failure


def owner_is_dead(path: Path) -> bool:
    """Whether the directory's ``owner`` file exists and nobody holds its lock."""
    fd = _lock_of_dead(path)
    if fd is None:
        return False
    os.close(fd)
    return True


def _lock_of_dead(path: Path) -> int | None:
    """The lock of a dead owner, taken; the caller closes it. None when the owner lives or there is none."""
    try:
        fd = os.open(path / OWNER, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def sweep_runs(settings: Settings) -> list[Path]:
    """Clean up behind creators that died: their VMMs and page servers are killed, the run directory removed.

    A run directory whose sandbox was recorded is complete; there only the ``owner`` file goes.
    """
    registry = Registry(settings.run_dir)
    if not any(owner_is_dead(entry) for entry in registry.entries()):
        return []
    with registry.locked():
        dead = registry.take_over_dead()
    for owned in dead:
        home = settings.state_dir / "sandboxes" / owned.path.name
        if (home / RECORD).exists():
            owned.disown()
        else:
            _kill_processes_of(owned.path)
            shutil.rmtree(home, ignore_errors=True)
            owned.discard()
    return [owned.path for owned in dead]


def _kill_processes_of(directory: Path) -> None:
    """Kill the VMM and the page server of ``directory``, and wait for their end."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    killed = [pidfd for pid in pids if pid != os.getpid() and (pidfd := _kill_if_of(pid, directory)) is not None]
    deadline = time.monotonic() + limits.VMM_KILL_SECONDS
    for pidfd in killed:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        os.close(pidfd)


def _kill_if_of(pid: int, directory: Path) -> int | None:
    """Kill the process if it belongs to ``directory``; its pidfd then, which the caller closes."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    # Looked at only now: while the pidfd is open, a living process keeps the pid.
    with contextlib.suppress(OSError):
        if _belongs(Path("/proc", str(pid)), directory):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return pidfd
    os.close(pidfd)
    return None


def _belongs(process: Path, directory: Path) -> bool:
    """Whether it is a VMM that works in ``directory`` or a page server that was told of it; nobody's shell."""
    arguments = (process / "cmdline").read_bytes().split(b"\0")
    if b"--api-sock" in arguments:
        return (process / "cwd").readlink() == directory
    return _PAGES_MODULE in arguments and any(b'"' + os.fsencode(directory) + b'"' in word for word in arguments)
