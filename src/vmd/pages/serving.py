"""A page server that is a process of its own: its signals, its statistics file, its last words.

Used by `vmd pages serve` and by the detached page server of an embedded sandbox.
"""

from __future__ import annotations

import json
import os
import select
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .. import limits
from .contract import Ended, EndReason
from .server import PageServer

# Warnings are passed on this often where no statistics file asks for more.
_IDLE_SECONDS = 1.0


class Serving:
    """Runs a `PageServer` to its end on the main thread of a process.

    ``say`` writes one line for people. ``stats_path``: see interfaces.md, "--stats". SIGTERM and
    SIGINT end it, SIGUSR1 writes the statistics now.
    """

    def __init__(self, server: PageServer, *, say: Callable[[str], None], stats_path: Path | None) -> None:
        self._server = server
        self._say = say
        self._stats_path = stats_path
        self._stats_failed = False
        self._news = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        server.handshaken.add_done_callback(self._wake)
        server.ended.add_done_callback(self._wake)

    def run(self) -> Ended:
        """Serve until the VMM has gone, a signal ends it, or it cannot go on."""
        with _Signals() as signals:
            poll = select.poll()
            poll.register(self._news, select.POLLIN)
            poll.register(signals.fd, select.POLLIN)
            while not self._server.ended.done():
                self._tell()
                poll.poll(self._period_ms())
                self._hear(signals)
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
                self._say(f"vmd: warning: stats {self._stats_path}: {failure.strerror}")
            self._stats_failed = True

    def _tell(self) -> None:
        self.write_stats()
        for line in self._server.warnings():
            self._say(f"vmd: warning: {line}")

    def _hear(self, signals: _Signals) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._news)
        heard = signals.take()
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


class _Signals:
    """Signals as bytes on a descriptor, so that one poll waits for everything."""

    _NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __enter__(self) -> _Signals:
        self.fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup_before = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, lambda *_: None) for number in self._NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self.fd)
        os.close(self._write_fd)

    def take(self) -> set[int]:
        try:
            return set(os.read(self.fd, 64))
        except BlockingIOError:
            return set()


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        os.unlink(temporary)  # noqa: PTH108
        raise
