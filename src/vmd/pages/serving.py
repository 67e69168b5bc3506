"""A page server that is a process of its own: its signals, its statistics file, its last words.

Used by `vmd pages serve` and by the detached page server of an embedded sandbox.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from .. import limits
from .contract import Ended, EndReason
from .life import NO_END, Server
from .process import one_line

# Warnings are passed on this often where no statistics file asks for more.
_IDLE_SECONDS = 1.0
# A core that reads from storage which does not answer hears neither of a stop nor of the VMM's exit.
# After this long the process goes without it. A stop has its time by interfaces.md. After an exit it
# may be busy for good reason: the last install in flight frees the dead VM's memory (70 ms a GiB).
_STOPPED_SECONDS = 0.6 * limits.PAGES_STOP_SECONDS
_GONE_SECONDS = 2.0
# A reader of stderr that lags may take so long, and a tenth of all time: one that does not read must hold
# up neither a VM nor the end of this process, though there be many lines to say.
_SAY_SECONDS = 0.05
_SAY_SHARE = 0.1
# What a pipe that poll calls writable takes without waiting (PIPE_BUF).
_SAY_BYTES_MAX = 4096


class _Patience:
    """With who reads stderr: how long he may still be waited for."""

    def __init__(self) -> None:
        self._left, self._at = _SAY_SECONDS, time.monotonic()

    def wait(self, poll: select.poll) -> bool:
        """Whether he takes a line."""
        since = time.monotonic()
        self._left = min(_SAY_SECONDS, self._left + _SAY_SHARE * (since - self._at))
        ready = poll.poll(1000 * self._left)
        self._at = time.monotonic()
        self._left = max(0.0, self._left - (self._at - since))
        return bool(ready)


_patience = _Patience()


def say(line: str) -> None:
    """Write one line to stderr. Never raises and never waits for long, whoever is or is not reading there."""
    data = one_line(line).encode(errors="surrogateescape")
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if _patience.wait(poll):
        with suppress(OSError):
            os.write(2, data[: _SAY_BYTES_MAX - 1] + b"\n")


def warn(line: str) -> None:
    """Write one warning to stderr."""
    say(f"vmd: warning: {line}")


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 as bytes on a descriptor, so that one poll waits for everything.

    Made once, before there is anything that a signal could leave behind, and never undone: up to
    the last instruction of the process one that comes late or twice must not kill it half way.
    """

    _NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self) -> None:
        self.fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in self._NUMBERS:
            signal.signal(number, lambda *_: None)

    def take(self) -> set[int]:
        """The signals that came since the last call."""
        try:
            return set(os.read(self.fd, 64))
        except BlockingIOError:
            return set()


class Serving:
    """Runs a `Server` to its end on the main thread of a process.

    ``stats_path``: see interfaces.md, "--stats". SIGTERM and SIGINT end it, SIGUSR1 writes the
    statistics now.
    """

    def __init__(self, server: Server, signals: Signals, *, stats_path: Path | None) -> None:
        self._server = server
        self._signals = signals
        self._stats_path = stats_path
        self._stats_failed = False
        self._poll = select.poll()
        self._watched = -1  # the VMM's pidfd
        self._leave_at, self._leave_why = math.inf, EndReason.STOPPED
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        server.handshaken.add_done_callback(self._wake)
        server.ended.add_done_callback(self._wake)

    def run(self) -> Ended:
        """Serve until the VMM has gone, a signal ends it, or it cannot go on."""
        for fd in (self._news, self._signals.fd):
            self._poll.register(fd, select.POLLIN)
        while not self._server.ended.done() and time.monotonic() < self._leave_at:
            self._tell()
            ready = dict(self._poll.poll(self._period_ms()))
            self._hear(gone=self._watched in ready)
        ended = self._server.close() if self._server.ended.done() else self._abandon()
        self._tell()
        os.close(self._news)
        return ended

    def write_stats(self) -> None:
        """Replace the statistics file. A failure is said once; serving goes on."""
        if self._stats_path is None:
            return
        try:
            _replace(self._stats_path, json.dumps(self._server.stats()) + "\n")
        except OSError as failure:
            if not self._stats_failed:
                warn(f"stats {self._stats_path}: {failure.strerror}")
            self._stats_failed = True

    def _tell(self) -> None:
        self.write_stats()
        for line in self._server.warnings():
            warn(line)

    def _hear(self, *, gone: bool) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._news)
        if self._watched < 0 and self._server.vmm_pidfd >= 0:
            self._watched = self._server.vmm_pidfd
            self._poll.register(self._watched, select.POLLIN)
        if gone:
            self._poll.unregister(self._watched)
            self._leave_in(_GONE_SECONDS, EndReason.GONE)
        if self._signals.take() & {signal.SIGTERM, signal.SIGINT}:
            self._server.stop()
            self._leave_in(_STOPPED_SECONDS, EndReason.STOPPED)

    def _leave_in(self, seconds: float, why: EndReason) -> None:
        """Bound the wait for the core's end; the VMM's exit counts for more than a stop."""
        self._leave_at = min(self._leave_at, time.monotonic() + seconds)
        if self._leave_why is not EndReason.GONE:
            self._leave_why = why

    def _abandon(self) -> Ended:
        warn(f"{NO_END}; leaving without it")
        return self._server.abandon(self._leave_why)

    def _period_ms(self) -> float | None:
        if self._leave_at < math.inf:
            return max(1.0, 1000 * (self._leave_at - time.monotonic()))
        if not self._server.handshaken.done():
            return None
        return 1000 * (limits.STATS_PERIOD_SECONDS if self._stats_path else _IDLE_SECONDS)

    def _wake(self, _: object) -> None:
        with suppress(OSError):  # the run may be over
            os.eventfd_write(self._news, 1)


def exit_line(ended: Ended, poisoned: int) -> str | None:
    """What goes after ``vmd: error:`` when the exit code is 1; None for code 0."""
    if ended.reason is EndReason.FAILED:
        return ended.error
    if ended.reason is EndReason.GONE and poisoned:
        return f"{poisoned} page{'s' if poisoned > 1 else ''} could not be read from the memory file"
    return None


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        os.unlink(temporary)  # noqa: PTH108
        raise
