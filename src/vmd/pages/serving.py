"""A page server that is a process of its own: its signals, its statistics file, its last words.

Used by `vmd pages serve` and by the detached page server of an embedded sandbox.
"""

from __future__ import annotations

import json
import os
import select
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

from .. import limits
from .contract import Ended, EndReason
from .server import PageServer

# Warnings are passed on this often where no statistics file asks for more.
_IDLE_SECONDS = 1.0
# A reader of stderr that lags may take this long; one that does not read at all must not hold up a VM.
_SAY_MS = 100
# What a pipe that poll calls writable takes without waiting (PIPE_BUF).
_SAY_BYTES_MAX = 4096


def say(line: str) -> None:
    """Write one line to stderr. Never raises and never waits for long, whoever is or is not reading there."""
    data = line.replace("\n", "\\n").encode(errors="surrogateescape")
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if poll.poll(_SAY_MS):
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
    """Runs a `PageServer` to its end on the main thread of a process.

    ``stats_path``: see interfaces.md, "--stats". SIGTERM and SIGINT end it, SIGUSR1 writes the
    statistics now.
    """

    def __init__(self, server: PageServer, signals: Signals, *, stats_path: Path | None) -> None:
        self._server = server
        self._signals = signals
        self._stats_path = stats_path
        self._stats_failed = False
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        server.handshaken.add_done_callback(self._wake)
        server.ended.add_done_callback(self._wake)

    def run(self) -> Ended:
        """Serve until the VMM has gone, a signal ends it, or it cannot go on."""
        poll = select.poll()
        poll.register(self._news, select.POLLIN)
        poll.register(self._signals.fd, select.POLLIN)
        while not self._server.ended.done():
            self._tell()
            poll.poll(self._period_ms())
            self._hear()
        ended = self._server.close()
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

    def _hear(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._news)
        heard = self._signals.take()
        if heard & {signal.SIGTERM, signal.SIGINT}:
            self._server.stop()

    def _period_ms(self) -> float | None:
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
