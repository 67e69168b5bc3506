"""Find the pager of a run directory, or start it.

Whoever starts it binds the socket, so that a request can be sent at once: it waits in the backlog
while the pager starts. Pager and standby share the socket, so that a request outlives a pager too.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from .. import limits
from ..errors import PagesFailed, TimedOut, VmdError
from ..settings import Settings
from ..store import private_directory
from .control import Control, PagerGone
from .look import JOURNAL, is_served

T = TypeVar("T")

SOCKET, LOCK, LOG = "pager.sock", "pager.lock", "pager.log"

_TRIES = 4
_BACKLOG = 64
_LOCK_STEP_SECONDS = 0.005
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); import vmd_core; vmd_core.pager_main(sys.argv[2:])"

_children: list[subprocess.Popen[bytes]] = []


def request(settings: Settings, ask: Callable[[Control], T]) -> T:
    """What ``ask`` makes of a connection to the pager, which is started where there is none.

    ``ask`` may be called again, with the next pager, when one dies before it answers. Raises what it
    raises, and `VmdError`.
    """
    for _ in range(_TRIES):
        with suppress(PagerGone), _connection(settings) as control:
            return ask(control)
    raise PagesFailed(f"pager: {_TRIES} of them ended before they answered; see {settings.run_dir / LOG}")


def running(settings: Settings) -> Control | None:
    """A connection to the pager; None where there is none. Raises `TimedOut`."""
    try:
        return Control(settings.run_dir / SOCKET)
    except OSError:
        return None


def unserved(settings: Settings) -> list[Path]:
    """The journals that no page server is alive on, though it should be, or though its VM may have ended."""
    return [path for path in settings.run_dir.glob(f"*/{JOURNAL}") if not is_served(path)]


def ensure(settings: Settings) -> None:
    """Start a pager where there is none. Returns at once: requests wait in its backlog. Raises `VmdError`."""
    control = running(settings)
    if control is None:
        control = _start(settings)
    control.__exit__()


def _connection(settings: Settings) -> Control:
    return running(settings) or _start(settings)


def _start(settings: Settings) -> Control:
    private_directory(settings.run_dir)
    with _locked(settings.run_dir / LOCK):
        control = running(settings)
        if control is not None:
            return control
        path = settings.run_dir / SOCKET
        try:
            with _listening(path) as listener:
                _spawn(listener, settings.run_dir)
                return Control(path)
        except OSError as failure:
            raise VmdError(f"pager: start: {failure.strerror or failure}") from failure


def _listening(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # nobody listens there: it was tried under the lock
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # the path has this mode from its first instant
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _spawn(listener: socket.socket, run_dir: Path) -> None:
    import vmd_core

    _children[:] = [child for child in _children if child.poll() is None]
    fd = listener.fileno()
    place = str(Path(vmd_core.__file__).parents[1])
    idle_ms = round(1000 * limits.PAGER_IDLE_SECONDS)
    words = ["--listener", str(fd), "--runs", str(run_dir.absolute()), "--idle", str(idle_ms)]
    with (run_dir / LOG).open("ab") as log:
        child = subprocess.Popen(
            # Isolated and without site: it starts in 10 ms, and nothing but the core is loaded.
            [sys.executable, "-I", "-S", "-c", _PROGRAM, place, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            pass_fds=(fd,),
            cwd="/",
            env={},
            start_new_session=True,
        )
    _children.append(child)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One at a time looks whether a pager is there and starts it. Held for a few milliseconds. Raises `TimedOut`."""
    deadline = time.monotonic() + limits.STORE_LOCK_SECONDS
    while (fd := _try_lock(path)) is None:
        if time.monotonic() > deadline:
            raise TimedOut(f"lock {path}: another process has held it for too long")
        time.sleep(_LOCK_STEP_SECONDS)
    try:
        yield
    finally:
        os.close(fd)


def _try_lock(path: Path) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink > 0:  # a pager that ends removes it
            return fd
    os.close(fd)
    return None
