"""The journal's file: made at the start, locked while served, removed when there is nothing to go on with.

What is in it is the native core's business (`crates/vmd-core/src/journal.rs` draws it).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .. import limits
from ..errors import Conflict, TimedOut, UsageError, VmdError
from .source import Image

_LOCK_STEP_SECONDS = 0.002


class Journal:
    """A journal that waits for its VM. Made by `create`; ``fd`` is what the core is given."""

    def __init__(self, path: Path, fd: int, status: os.stat_result) -> None:
        self.path = path
        self.fd = fd
        self._inode = (status.st_dev, status.st_ino)

    @classmethod
    def of(cls, path: Path) -> Journal:
        """The journal at ``path``, which a core of ours serves from; it has the descriptor."""
        return cls(path.absolute(), -1, path.lstat())

    @classmethod
    def create(cls, path: Path, image: Image, core: str, warn: Callable[[str], None] = lambda line: None) -> Journal:
        """Make the file, private and locked, for a VM that is to be served from ``image``.

        Raises `Conflict` when there is something, `UsageError` for another core than the native one, `VmdError`.
        """
        path = path.absolute()
        require_native(core, "--journal")
        import vmd_core

        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            hint = f"adopt its VM, or remove it: vmd pages adopt --pid PID --journal {path}"
            raise Conflict(f"journal {path}: it exists already, and is not reused", hint=hint) from None
        except OSError as failure:
            raise VmdError(f"journal {path}: {failure.strerror}") from failure
        journal = cls(path, fd, os.fstat(fd))
        try:
            _lock(fd, path)
            vmd_core.write_waiting_journal(fd, image.fd, os.fspath(image.path.absolute()))
            _judge_place(path, warn)
        except BaseException as failure:
            journal.remove()
            journal.close()
            if isinstance(failure, OSError):
                raise VmdError(f"journal {path}: {failure.strerror or failure}") from failure
            raise
        return journal

    def remove(self) -> None:
        """Remove the file, if it is still ours. Idempotent."""
        with suppress(OSError):
            status = self.path.lstat()
            if (status.st_dev, status.st_ino) == self._inode:
                self.path.unlink()

    def close(self) -> None:
        """Close our descriptor; the lock stays with whoever has another. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _lock(fd: int, path: Path) -> None:
    """Take the lock, for which there is nobody to wait but somebody who looks whether a page server has it."""
    deadline = time.monotonic() + limits.STORE_LOCK_SECONDS
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() >= deadline:
            raise TimedOut(f"lock {path}: another process has held it for {limits.STORE_LOCK_SECONDS:g} s")
        time.sleep(_LOCK_STEP_SECONDS)


def _judge_place(path: Path, warn: Callable[[str], None]) -> None:
    from ..host.filesystem import kind  # not imported where no journal is made: a start should be short

    if (found := kind(path)) != "tmpfs":
        warn(f"journal {path}: it is on {found}; it belongs on a tmpfs, where no disk can hold up the page server")


def require_native(core: str, what: str) -> None:
    """Raise `UsageError` unless ``core`` is the native one."""
    if core != "native":
        raise UsageError(f"{what}: needs the native core, not the {core} one", hint="build it with `make develop`")
