"""A page server in a process of its own, for a sandbox that outlives the command that made it.

The parent binds the socket, so that a VMM may connect at once: its handshake waits in the backlog
while Python starts in the child. The child reports over a pipe, one JSON line: ``{"vmm": PID}``
when it serves, ``{"error": TEXT}`` when the handshake failed. End of file alone means it died.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from array import array
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import limits
from ..errors import HandshakeRefused, PagesFailed, VmdError
from .contract import Beside, Service
from .cores import core_name
from .handshake import Listener
from .life import settle
from .process import raise_descriptor_limit
from .server import PageServer, for_page_size
from .serving import Serving, Signals, exit_line, say, warn
from .source import Image

STATS_FILE = "pages.json"
LOG_FILE = "pages.log"
_PLAN_FILE = "pages.plan"


@dataclass(frozen=True, slots=True)
class _Order:
    """What the child is told on its command line, as JSON. Offsets come by file: they may be many."""

    listener: int
    socket: str
    memory: str
    directory: str
    page_size: int
    beside: str
    skipped: int
    refused: str | None
    prefetch_bytes_max: int
    core: str | None
    report: int = -1


class DetachedPages:
    """The parent's side: the same surface as `PageServer`, for a server that may be left running.

    ``handshaken`` gives the VMM's pid, or raises; ``pid`` is the server's own. Its statistics and
    its words are files in ``directory``.
    """

    def __init__(
        self, socket: Path, memory: Path, service: Service, page_size: int, directory: Path, *, core: str | None = None
    ) -> None:
        """Listen on ``socket`` and start the process. Raises `VmdError`, leaving nothing behind.

        ``page_size``: of the guest, bytes; ``service.offsets`` are of that size.
        """
        core = core_name(core)
        self.handshaken: Future[int] = Future()
        self._directory = directory
        self._over = False  # closed or forgotten
        Image(memory).close()  # what is wrong with it is said here, not in a log file
        with ExitStack() as undo:
            listener = Listener(socket)
            undo.callback(listener.close)
            self._listener: Listener | None = listener
            order = _Order(
                listener=listener.fileno(), socket=str(listener.path), memory=str(memory.absolute()),
                directory=str(directory.absolute()), page_size=page_size, beside=service.beside.value,
                skipped=service.skipped, refused=service.refused,
                prefetch_bytes_max=service.prefetch_bytes_max, core=core,
            )  # fmt: skip
            try:
                (directory / _PLAN_FILE).write_bytes(service.offsets.tobytes())
                self._begin(order, undo)
            except (OSError, RuntimeError) as failure:  # no room, no descriptor, no process, no thread
                raise PagesFailed(f"page server: {failure}") from failure
            undo.pop_all()
        self.pid = self._child.pid

    def stats(self) -> dict[str, Any]:
        """The last statistics that the server wrote; empty before the first."""
        return read_stats(self._directory)

    def forget(self) -> None:
        """Leave it running: it ends with its VMM. Call after the handshake; then only `pid` counts."""
        self._over = True
        if self._listener is not None:
            self._listener.refuse_others()  # our copy only; the path is the server's now
            self._listener = None
        self._child.returncode = 0  # not ours to wait for any more

    def stop(self) -> None:
        """Ask it to end. Returns at once; idempotent."""
        if not self._over:
            self._child.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Stop it, wait for its end, remove its socket. Idempotent; nothing after `forget`.

        Bounded: SIGTERM, then SIGKILL, have `limits.PAGES_STOP_SECONDS` each.
        """
        if self._over:
            return
        self._over = True
        _end(self._child)
        self._listen.join(limits.PAGES_STOP_SECONDS)
        self.handshaken.cancel()  # of a process that could not be ended; any other has said its word
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _begin(self, order: _Order, undo: ExitStack) -> None:
        self._report, report = os.pipe2(os.O_CLOEXEC)
        undo.callback(os.close, self._report)
        try:
            self._child = _spawn(replace(order, report=report), self._directory / LOG_FILE)
        finally:
            os.close(report)
        undo.callback(_end, self._child)
        self._listen = threading.Thread(target=self._hear, name="vmd-detached", daemon=True)
        self._listen.start()

    def _hear(self) -> None:
        with os.fdopen(self._report, "rb") as report:
            line = report.readline()
        try:
            news = json.loads(line)
        except ValueError:
            news = {"error": f"page server {self.pid} ended before the handshake; see {self._directory / LOG_FILE}"}
        if "vmm" in news:
            settle(self.handshaken, news["vmm"])
        elif news.get("stopped"):
            self.handshaken.cancel()
        else:
            failure = HandshakeRefused if news.get("refused") else PagesFailed
            settle(self.handshaken, failure(news["error"]))


def read_stats(directory: Path) -> dict[str, Any]:
    """The statistics file of the detached page server of this directory; empty when there is none."""
    try:
        stats = json.loads((directory / STATS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return stats if isinstance(stats, dict) else {}


def _spawn(order: _Order, log: Path) -> subprocess.Popen[bytes]:
    fields = {name: getattr(order, name) for name in order.__slots__}
    with log.open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(fields)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(order.listener, order.report),
            start_new_session=True,
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, then make it. One that waits for storage in state D is left to die of SIGKILL later."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        child.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(limits.PAGES_STOP_SECONDS)
            return
    with suppress(RuntimeError):  # no thread to be had: a zombie, until this process ends
        threading.Thread(target=child.wait, name="vmd-reaper", daemon=True).start()


# ---- the child's side -----------------------------------------------------------------------


def main() -> int:
    """Serve as the order on the command line says; the exit code is that of `pages serve`."""
    signals = Signals()
    raise_descriptor_limit()
    order = _Order(**json.loads(sys.argv[1]))
    os.set_inheritable(order.report, False)
    try:
        server = _serve(order)
    except Exception as failure:  # whatever it is, the parent waits for word of it
        why = str(failure) if isinstance(failure, VmdError) else f"page server: {failure!r}"
        _report(order.report, {"error": why})
        return _say_error(why)
    server.handshaken.add_done_callback(lambda future: _report(order.report, _news(future)))
    ended = Serving(server, signals, stats_path=Path(order.directory, STATS_FILE)).run()
    line = exit_line(ended, server.counters().poisoned)
    return _say_error(line) if line else 0


def _serve(order: _Order) -> PageServer:
    offsets = array("Q")
    offsets.frombytes(Path(order.directory, _PLAN_FILE).read_bytes())
    service = Service(
        Beside(order.beside), offsets, skipped=order.skipped, refused=order.refused,
        prefetch_bytes_max=order.prefetch_bytes_max,
    )  # fmt: skip

    plan = for_page_size(order.page_size, service)
    listener = Listener.from_fd(order.listener, order.socket)
    server = PageServer(listener, Image(order.memory), plan, core=order.core, retry=False, warn=warn)
    server.start()
    return server


def _news(handshaken: Future[int]) -> dict[str, Any]:
    if handshaken.cancelled():
        return {"stopped": True}
    failure = handshaken.exception()
    if failure is None:
        return {"vmm": handshaken.result()}
    return {"error": str(failure), "refused": isinstance(failure, HandshakeRefused)}


def _report(fd: int, news: dict[str, Any]) -> None:
    """Tell the parent, who may have gone: then nobody wants to know. Never waits for it."""
    os.set_blocking(fd, False)
    try:
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(fd, json.dumps(news).encode() + b"\n")
    finally:
        os.close(fd)


def _say_error(line: str) -> int:
    say(f"vmd: error: {line}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
