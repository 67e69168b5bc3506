"""What is on disk: who owns a directory, whole files or none, and what dead owners left behind.

A directory that is still being made carries a file ``owner`` with a lock (flock(2)) that its maker
holds; the kernel drops the lock when the maker dies, however it dies. Whoever can take the lock
knows that nobody is coming back. `Registry` guards the moment between making a directory and
locking it: makers and sweepers of one parent take its lock for that moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from . import limits
from .errors import Conflict, TimedOut, VmdError
from .settings import Settings

OWNER = "owner"
RECORD = "sandbox.json"

# How the process of a detached page server was started; its run directory is in its order, as JSON.
_PAGES_MODULE = b"vmd.pages.detached"

# What lies in the run directory and is ours to sweep: sandboxes, and the VMs of builds and of the demo.
_RUN_NAMES = "sb-[a-z2-7]{10}|build-.+"

_LOCK_POLL_SECONDS = 0.01


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


def private_directory(path: Path) -> None:
    """Make ``path``, and every part of it that is missing, for this user alone; one that is there is checked.

    Raises `VmdError` where it cannot be made or `require_private` refuses it.
    """
    try:
        for part in (*reversed(path.parents), path):
            with contextlib.suppress(FileExistsError):
                part.mkdir(mode=0o700)
    except OSError as failure:
        raise VmdError(f"create {path}: {failure.strerror}") from failure
    require_private(path)


def require_private(path: Path) -> bool:
    """Whether there is a ``path``; if so it is a directory of this user that nobody else can write to.

    Records name processes to kill and directories to remove, so they are only read where no one else can
    have put them. Raises `VmdError` with the fix as its hint.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    except OSError as failure:
        raise VmdError(f"{path}: {failure.strerror}") from failure
    elsewhere = "set VMD_STATE_DIR and VMD_RUN_DIR to directories of your own"
    if not stat.S_ISDIR(status.st_mode):
        raise VmdError(f"{path} is no directory", hint=f"remove it, or {elsewhere}")
    if status.st_uid != os.geteuid():
        who = f"{path} belongs to uid {status.st_uid}, not to uid {os.geteuid()}"
        raise VmdError(f"{who}: what is in it cannot be trusted", hint=f"remove it, or {elsewhere}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise VmdError(f"{path} can be written by others: what is in it cannot be trusted", hint=f"chmod go-w {path}")
    return True


class Owned:
    """A directory that this process is making, or removing; the lock on its ``owner`` file says so.

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

    def rename(self, path: Path) -> None:
        """Give the directory another name. Raises `OSError`; then it has the old one."""
        self.path.rename(path)
        self.path = path

    def discard(self) -> None:
        """Remove the directory with all that is in it, then drop the lock. Idempotent.

        ``owner`` goes last: cut short at any moment, it leaves what the next sweep knows to be dead. So does
        a file that cannot be removed.
        """
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                if _empty(self.path):
                    (self.path / OWNER).unlink(missing_ok=True)
                    self.path.rmdir()
            self._release()

    def _release(self) -> None:
        os.close(self._fd)
        self._fd = -1


def _empty(directory: Path) -> bool:
    """Remove all but ``owner``; whether that is all that is left."""
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != OWNER:
            with contextlib.suppress(OSError):
                entry.unlink()
    return {entry.name for entry in directory.iterdir()} <= {OWNER}


class Registry:
    """A directory of directories: makes owned ones, finds those whose owner is dead.

    It is ``root``, or ``below`` it. Only directories whose whole name ``ours`` matches are ever swept:
    what somebody else keeps there is none of our business.
    """

    def __init__(self, root: Path, *below: str, ours: str = "(?!)") -> None:
        self.path = root.joinpath(*below)
        self._root = root
        self._ours = re.compile(ours)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the registry's lock: no other maker, sweeper or remover is at work. Short waits only.

        Raises `TimedOut`, and `VmdError` where the directory is not to be trusted.
        """
        fd = self._open()
        try:
            for pause in _attempts(fd, self.path):
                time.sleep(pause)
            yield
        finally:
            os.close(fd)

    @contextlib.asynccontextmanager
    async def locked_async(self) -> AsyncIterator[None]:
        """As `locked`, for a loop that has other work while the lock is held elsewhere."""
        fd = self._open()
        try:
            for pause in _attempts(fd, self.path):
                await asyncio.sleep(pause)
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
        return self.take(path)

    def take(self, path: Path) -> Owned:
        """Own a directory that nobody owns; call it `locked`. Raises `TimedOut`, `OSError`."""
        fd = os.open(path / OWNER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            for pause in _attempts(fd, path):  # a sweeper that looks from outside may hold it for a moment
                time.sleep(pause)
        except BaseException:
            os.close(fd)
            raise
        return Owned(path, fd)

    def dead(self) -> list[Path]:
        """The directories whose owner is dead; certain only under the lock."""
        return [entry for entry in self.entries() if self._ours.fullmatch(entry.name) and is_dead(entry)]

    def take_over_dead(self) -> list[Owned]:
        """Own every directory whose owner is dead, so that it can be cleaned up in peace; call it `locked`."""
        taken = []
        for entry in self.dead():
            with contextlib.suppress(FileNotFoundError):  # its owner was about to remove the empty directory
                taken.append(self.take(entry))
        return taken

    def entries(self) -> list[Path]:
        """The directories in it, sorted by name; empty when the registry does not exist."""
        if not self.there():
            return []
        return sorted(entry for entry in self.path.iterdir() if entry.is_dir() and not entry.is_symlink())

    def there(self) -> bool:
        """Whether it exists. Raises `VmdError` where it is not to be trusted."""
        return require_private(self._root) and require_private(self.path)

    def make(self) -> Path:
        """Its path, made and checked. Raises `VmdError`."""
        private_directory(self._root)
        private_directory(self.path)
        return self.path

    def _open(self) -> int:
        return os.open(self.make(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _attempts(fd: int, path: Path) -> Iterator[float]:
    """Try to lock ``fd`` until it is; gives the seconds to wait before the next try. Raises `TimedOut`."""
    deadline = time.monotonic() + limits.STORE_LOCK_SECONDS
    while not _try_lock(fd):
        if time.monotonic() >= deadline:
            raise TimedOut(
                f"lock {path}: another process has held it for {limits.STORE_LOCK_SECONDS:g} s",
                hint=f"`fuser -v {path}` names it; `chmod 700 {path}` keeps other users off",
            )
        yield _LOCK_POLL_SECONDS


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_dead(path: Path) -> bool:
    """Whether nobody holds the lock on its ``owner`` file; or there is no such file, nor anything else.

    An empty directory is what a maker leaves that is killed before it owns it, or while it discards it.
    """
    try:
        fd = os.open(path / OWNER, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return _is_empty(path)
    try:
        # One that was disowned between open and lock is no owner file any more.
        return _try_lock(fd) and os.fstat(fd).st_nlink > 0
    finally:
        os.close(fd)


def _is_empty(path: Path) -> bool:
    try:
        return not any(path.iterdir())
    except FileNotFoundError:
        return False


def runs(settings: Settings) -> Registry:
    """The run directories: of sandboxes, and of the VMs of builds."""
    return Registry(settings.run_dir, ours=_RUN_NAMES)


def sweep_runs(settings: Settings) -> list[Path]:
    """Clean up behind creators that died: their VMMs and page servers are killed, the run directory removed.

    A run directory whose sandbox was recorded is complete; there only the ``owner`` file goes.
    """
    registry = runs(settings)
    if not registry.dead():
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
    if _PAGES_MODULE not in arguments:
        return False
    order = arguments[arguments.index(_PAGES_MODULE) + 1]
    try:
        return bool(json.loads(order)["directory"] == str(directory))
    except (ValueError, KeyError, TypeError):  # somebody else's module of that name
        return False
