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
from contextlib import ExitStack
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
_PIPE_BYTES = 65536

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
    """A process that was just started: what tells it apart for ever, and two descriptors that the receiver owns.

    ``log`` is an end of its log's FIFO: what the VMM said can be read, also after its death, as long as it is open.
    """

    pid: int
    start_time: int
    pidfd: int
    log: int


def start(firecracker: str, directory: Path, vm_id: str, *, dies_with_parent: bool) -> Started:
    """Start a VMM in ``directory``; its API is not up yet.

    Makes there `CONSOLE_IN`, `CONSOLE_OUT` and `LOG`, all FIFOs; the VMM's working directory is
    ``directory``, so every path that it is given may be relative. A guest that nobody listens to can
    fill nothing: its output stays in a pipe of 64 KiB and the rest is dropped (stdout is
    non-blocking). Firecracker logs 165 bytes for each byte dropped, 5 MB/s: so the log is a FIFO too,
    which keeps the first 64 KiB, and not a file.

    ``dies_with_parent``: SIGKILL when the *thread* that called this ends, so call it from one
    that lives as long as the VM should. Raises `VmmError`, leaving nothing that was not there.
    """
    command = [firecracker, "--api-sock", API_SOCKET, "--id", vm_id, "--log-path", LOG, "--level", "Warn"]
    if dies_with_parent:
        command = [*_DIE_WITH_PARENT, str(os.getpid()), *command]
    made: list[Path] = []
    try:
        with ExitStack() as undo:
            if os.path.lexists(directory / API_SOCKET):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), API_SOCKET)
            stdin, stdout, log = (_fifo(directory / name, undo, made) for name in (CONSOLE_IN, CONSOLE_OUT, LOG))
            os.set_blocking(stdin, True)  # what Firecracker is used to
            child = subprocess.Popen(
                command, cwd=directory, stdin=stdin, stdout=stdout, stderr=log, start_new_session=True
            )
            return _identify(child, log)
    except (OSError, subprocess.SubprocessError) as failure:
        for path in made:
            path.unlink(missing_ok=True)
        raise VmmError(f"start {firecracker} in {directory}: {failure}") from failure


def _fifo(path: Path, undo: ExitStack, made: list[Path]) -> int:
    os.mkfifo(path, 0o600)
    made.append(path)
    # Read-write: opening never waits for the other end, and the VMM, which is then reader and
    # writer itself, sees neither end of file nor SIGPIPE whoever comes and goes.
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    undo.callback(os.close, fd)
    return fd


def _identify(child: subprocess.Popen[bytes], log: int) -> Started:
    try:
        with ExitStack() as undo:
            pidfd = os.pidfd_open(child.pid)
            undo.callback(os.close, pidfd)
            kept = os.dup(log)
            undo.callback(os.close, kept)
            started = Started(child.pid, start_time(child.pid), pidfd, kept)
            undo.pop_all()
    except OSError:
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
    """Take the VMM's log and return its end as one line, for an error's text; empty when there is none.

    Taken is gone: the log is a FIFO. It outlives the VMM while its `Started.log` is open.
    """
    try:
        fifo = os.open(directory / LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        text = os.read(fifo, _PIPE_BYTES)
    except BlockingIOError:
        text = b""
    finally:
        os.close(fifo)
    return " ".join(text[-_LOG_TAIL_BYTES:].decode("utf-8", "replace").split())


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
