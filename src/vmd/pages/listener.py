"""The socket that a VMM connects to: private from the first instant, and never somebody else's.

Whether an old socket is still held is told from /proc/net/unix, never by connecting: a connection
would be taken for a VMM. That file shows the sockets of our own network namespace.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .. import limits
from ..errors import Conflict, VmdError

# Peers that connect while one is in its handshake wait here; a few are plenty.
_BACKLOG = 16
# Another server that starts in the same directory holds its lock for microseconds.
_LOCK_SECONDS = 2.0
_LOCK_STEP_SECONDS = 0.01
_PROC_UNIX = Path("/proc/net/unix")


class Listener:
    """A listening unix stream socket and the path that it owns. `close` ends both."""

    def __init__(self, path: str | os.PathLike[str], *, owner: tuple[int, int] | None = None) -> None:
        """Bind ``path`` with mode 0600, give it to ``owner`` (uid, gid), listen.

        A stale socket is replaced. Raises `Conflict` when the path is a live socket or something
        else, `VmdError` when it is too long or cannot be bound; then nothing is left behind.
        """
        self.path = Path(os.path.abspath(path))  # noqa: PTH100  (keeps .. and links for the kernel to judge)
        address = _address(os.fspath(path), self.path)
        self._socket: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._inode: tuple[int, int] | None = None
        try:
            with _locked(self.path.parent):
                _clear_stale(self.path)
                self._bind(self._socket, address, owner)
        except OSError as failure:
            self.close()
            raise VmdError(f"socket {self.path}: {failure.strerror or failure}") from failure
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_fd(cls, fd: int, path: str | os.PathLike[str]) -> Listener:
        """Take over a listening descriptor that a parent has bound to ``path``.

        Raises `VmdError` when it is not a listening unix stream socket; ``fd`` is then left open.
        """
        self = cls.__new__(cls)
        self.path = Path(os.path.abspath(path))  # noqa: PTH100
        self._inode = None
        try:
            listening = socket.socket(fileno=fd)
            listens = listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as failure:
            raise VmdError(f"socket {self.path}: inherited descriptor {fd}: {failure.strerror}") from failure
        if not listens or (listening.family, listening.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            listening.detach()
            raise VmdError(f"socket {self.path}: inherited descriptor {fd} is not a listening unix stream socket")
        self._socket = listening
        listening.setblocking(False)
        os.set_inheritable(fd, False)
        with suppress(OSError):
            self._inode = _inode(self.path)
        return self

    def _bind(self, listening: socket.socket, address: str, owner: tuple[int, int] | None) -> None:
        # The kernel gives the path the mode of the socket's own inode: no window, and no umask,
        # which is the whole process's and would change what other threads create meanwhile.
        os.fchmod(listening.fileno(), 0o600)
        listening.bind(address)
        self._inode = _inode(self.path)
        if owner is not None:
            os.chown(self.path, *owner, follow_symlinks=False)
        listening.listen(_BACKLOG)

    def fileno(self) -> int:
        """The listening descriptor, for poll. Raises `VmdError` after `refuse_others`."""
        return self._listening().fileno()

    def accept(self) -> socket.socket | None:
        """The next peer's connection, non-blocking; None when there is none after all. Raises `VmdError`."""
        try:
            connection, _ = self._listening().accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as failure:
            raise VmdError(f"socket {self.path}: accept: {failure.strerror}") from failure
        connection.setblocking(False)
        return connection

    def refuse_others(self) -> None:
        """Stop listening: peers that come later are refused at once. The path stays. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """Stop listening and remove the path, if it is still ours. Idempotent."""
        self.refuse_others()
        inode, self._inode = self._inode, None
        with suppress(OSError):
            if inode is not None and _inode(self.path) == inode:
                self.path.unlink()

    def _listening(self) -> socket.socket:
        if self._socket is None:
            raise VmdError(f"socket {self.path}: no longer listening")
        return self._socket


def _address(given: str, absolute: Path) -> str:
    """What to bind: the absolute path, which /proc/net/unix then shows; as given where that is too long."""
    for address in (str(absolute), given):
        if len(os.fsencode(address)) <= limits.SOCKET_PATH_BYTES_MAX and "\n" not in address:
            return address
    if "\n" in given:
        raise VmdError(f"socket {given!r}: a line feed in the path")
    raise VmdError(
        f"socket {absolute}: the path has {len(os.fsencode(str(absolute)))} bytes,"
        f" the kernel takes {limits.SOCKET_PATH_BYTES_MAX}",
        hint="use a shorter directory",
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One server at a time looks for a stale socket and binds, or two would unlink each other's."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Conflict(f"socket directory {directory}: locked by another process") from None
            time.sleep(_LOCK_STEP_SECONDS)
        yield
    finally:
        os.close(fd)


def _clear_stale(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise Conflict(f"socket {path}: the path exists and is not a socket", hint="remove it, or choose another path")
    if is_held(path):
        raise Conflict(f"socket {path}: in use by another process")
    path.unlink()


def is_held(path: Path) -> bool:
    """Whether a socket of this network namespace is bound to ``path``, told without connecting.

    A relative entry with the same file name counts: what it is relative to is not known.
    """
    return any(_same(entry, path) for entry in _bound_paths())


def _bound_paths() -> Iterator[Path]:
    """The paths of /proc/net/unix: the eighth column, which may hold spaces, and is often absent."""
    with _PROC_UNIX.open("rb") as table:
        for line in table:
            columns = line.rstrip(b"\n").split(maxsplit=7)
            if len(columns) == 8:
                yield Path(os.fsdecode(columns[7]))


def _same(entry: Path, path: Path) -> bool:
    if entry.name != path.name:
        return False
    return not entry.is_absolute() or entry.parent.resolve() == path.parent.resolve()


def _inode(path: Path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_dev, status.st_ino
