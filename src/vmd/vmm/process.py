"""The VMM as a process: started, recognized, waited for, killed.

A bare pid is never trusted: a process is its pid, its start time and a pidfd taken while both
matched. Death is read from the pidfd, where a zombie counts as dead.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .. import limits
from ..errors import NotFound, TimedOut, VmmError
from ..settings import Settings
from .ready import readable

API_SOCKET = "api.sock"
CONSOLE_IN = "console.in"
CONSOLE_OUT = "console.out"
CONSOLE_LOCK = "console.lock"
LOG = "vmm.log"

_LOG_TAIL_BYTES = 2048

# Asks the kernel for SIGKILL at the parent's death, then makes sure that the parent had not died
# before that. Two more execs cost 1.3 ms; a preexec_fn costs 3 ms and more, growing with the
# caller's memory (it forks where Popen would vfork), and runs Python in a fork of a threaded process.
_DIE_WITH_PARENT = ["setpriv", "--pdeathsig", "KILL", "/bin/sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"']


def find_firecracker(settings: Settings) -> str:
    """The path of the firecracker binary.

    ``VMD_FIRECRACKER``, else the one beside this Python, else the one on ``PATH``. Raises
    `NotFound` with the fix as its hint.
    """
    return _find_binary("firecracker", settings.firecracker, "VMD_FIRECRACKER")


def find_jailer(settings: Settings) -> str:
    """The path of the jailer binary; see `find_firecracker`."""
    return _find_binary("jailer", settings.jailer, "VMD_JAILER")


def _find_binary(name: str, wanted: str | None, variable: str) -> str:
    if wanted is not None:
        if not os.access(wanted, os.X_OK) or not Path(wanted).is_file():
            raise NotFound(f"{variable}: {wanted!r} is not an executable file", hint=f"unset {variable} or correct it")
        return str(Path(wanted).absolute())
    beside = Path(sys.prefix, "bin", name)
    if os.access(beside, os.X_OK):
        return str(beside)
    found = shutil.which(name)
    if found is None:
        raise NotFound(f"{name}: not found", hint=f"run `make develop`, or set {variable} to the binary")
    return str(Path(found).absolute())


class Started(NamedTuple):
    """A process that was just started: what tells it apart for ever, and a pidfd that the receiver owns."""

    pid: int
    start_time: int
    pidfd: int


def start(firecracker: str, directory: Path, vm_id: str, *, dies_with_parent: bool) -> Started:
    """Start a VMM in ``directory``; its API is not up yet.

    Makes there `CONSOLE_IN`, `CONSOLE_OUT` (FIFOs) and `LOG`; the VMM's working directory is
    ``directory``, so every path that it is given may be relative. The console cannot fill
    anything: a guest that nobody listens to writes into a pipe of 64 KiB, and what does not fit
    is dropped by Firecracker (its stdout is non-blocking).

    ``dies_with_parent``: SIGKILL when the *thread* that called this ends, so call it from one
    that lives as long as the VM should. Raises `VmmError`, leaving nothing that was not there.
    """
    made: list[Path] = []
    command = [firecracker, "--api-sock", API_SOCKET, "--id", vm_id, "--log-path", LOG, "--level", "Warn"]
    if dies_with_parent:
        command = [*_DIE_WITH_PARENT, str(os.getpid()), *command]
    try:
        with _Streams(directory, made) as (stdin, stdout, stderr):
            child = subprocess.Popen(
                command,
                cwd=directory,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        return _identify(child)
    except (OSError, subprocess.SubprocessError) as failure:
        for path in made:
            path.unlink(missing_ok=True)
        raise VmmError(f"start {firecracker} in {directory}: {failure}") from failure


def _identify(child: subprocess.Popen[bytes]) -> Started:
    pidfd = -1
    try:
        pidfd = os.pidfd_open(child.pid)
        started = Started(child.pid, start_time(child.pid), pidfd)
    except OSError:
        if pidfd >= 0:
            os.close(pidfd)
        child.kill()
        child.wait()
        raise
    child.returncode = 0  # from here on its pidfd speaks for it: Popen must neither reap it nor warn
    return started


def clean(directory: Path) -> None:
    """Remove from ``directory`` what `start` and its VMM made there. Errors are left to the owner."""
    for name in (API_SOCKET, CONSOLE_IN, CONSOLE_OUT, CONSOLE_LOCK, LOG):
        (directory / name).unlink(missing_ok=True)


def log_tail(directory: Path) -> str:
    """The end of the VMM's log as one line, for an error's text; empty when there is none."""
    try:
        with (directory / LOG).open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_TAIL_BYTES))
            return " ".join(log.read(_LOG_TAIL_BYTES).decode("utf-8", "replace").split())
    except OSError:
        return ""


def start_time(pid: int) -> int:
    """When ``pid`` started, in clock ticks since boot: field 22 of ``/proc/PID/stat`` (proc(5)).

    Raises `ProcessLookupError` when there is no such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH)) from None
    # The second field is the command in parentheses, which may itself hold spaces and parentheses.
    return int(stat[stat.rindex(b")") + 2 :].split()[19])


def find(pid: int, started: int) -> int | None:
    """A pidfd of the process that had ``pid`` and start time ``started``; None when it is dead.

    The caller closes it.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        # In this order: still alive *after* the start time was read proves that it was its own.
        same = start_time(pid) == started and not is_dead(pidfd)
    except ProcessLookupError:
        same = False
    if not same:
        os.close(pidfd)
        return None
    return pidfd


def is_dead(pidfd: int) -> bool:
    """Whether the process has ended; a zombie has."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


async def exited(pidfd: int) -> None:
    """Wait for the end of the process, without bound. Any number of tasks may wait."""
    await readable(pidfd)


async def kill(pidfd: int, *, seconds: float = limits.VMM_KILL_SECONDS) -> None:
    """SIGKILL, wait for the end, reap it if it is a child of ours. A dead process is no error.

    `TimedOut` when it has not ended within ``seconds``.
    """
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return
    try:
        async with asyncio.timeout(seconds):
            await exited(pidfd)
    except TimeoutError:
        raise TimedOut(f"kill the VMM: still there {seconds:g} s after SIGKILL") from None
    reap(pidfd)


def reap(pidfd: int) -> None:
    """Take the exit status of a dead child of ours; nothing for a process that is none."""
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return


class _Streams:
    """stdin, stdout and stderr of a VMM, open while it is started; names what it made."""

    def __init__(self, directory: Path, made: list[Path]) -> None:
        self._directory = directory
        self._made = made
        self._open: list[int] = []

    def __enter__(self) -> tuple[int, int, int]:
        try:
            for name in (CONSOLE_IN, CONSOLE_OUT):
                os.mkfifo(self._directory / name, 0o600)
                self._made.append(self._directory / name)
            # Read-write: opening never waits for the other end, and the VMM, which is then reader and
            # writer itself, sees neither end of file nor SIGPIPE whoever comes and goes.
            self._add(CONSOLE_IN, os.O_RDWR)
            self._add(CONSOLE_OUT, os.O_RDWR | os.O_NONBLOCK)
            self._add(LOG, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
            self._made.append(self._directory / LOG)
        except BaseException:
            self.__exit__()
            raise
        stdin, stdout, stderr = self._open
        return stdin, stdout, stderr

    def __exit__(self, *_: object) -> None:
        for fd in self._open:
            os.close(fd)

    def _add(self, name: str, flags: int) -> None:
        self._open.append(os.open(self._directory / name, flags | os.O_CLOEXEC, 0o600))
