"""A page server in a process of its own, for a sandbox that outlives the command that made it.

The parent binds the socket, so that a VMM may connect at once: its handshake waits in the backlog
while Python starts in the child. The child reports over a pipe, one JSON line: ``{"vmm": PID}``
when it serves, ``{"error": TEXT}`` when the handshake failed. End of file alone means it died.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from array import array
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import limits
from ..errors import HandshakeRefused, PagesFailed, VmdError
from .contract import Beside, Service
from .handshake import Listener
from .server import PageServer
from .serving import Serving, Signals, exit_line, say
from .source import Image

STATS_FILE = "pages.json"
LOG_FILE = "pages.log"
_PLAN_FILE = "pages.plan"


@dataclass(frozen=True, slots=True)
class _Order:
    """What the child is told on its command line, as JSON. Offsets come by file: they may be many."""

    listener: int
    report: int
    socket: str
    memory: str
    directory: str
    page_size: int
    beside: str
    skipped: int
    refused: str | None
    prefetch_bytes_max: int
    core: str | None


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
        self.handshaken: Future[int] = Future()
        self._directory = directory
        self._kept = False
        Image(memory).close()  # what is wrong with it is said here, not in a log file
        listener = Listener(socket)
        self._listener: Listener | None = listener
        self._report, report = os.pipe2(os.O_CLOEXEC)
        try:
            (directory / _PLAN_FILE).write_bytes(service.offsets.tobytes())
            order = _Order(
                listener=listener.fileno(), report=report, socket=str(listener.path), memory=str(memory.absolute()),
                directory=str(directory.absolute()), page_size=page_size, beside=service.beside.value,
                skipped=service.skipped, refused=service.refused,
                prefetch_bytes_max=service.prefetch_bytes_max, core=core,
            )  # fmt: skip
            self._child = _spawn(order, directory / LOG_FILE)
        except BaseException:
            os.close(self._report)
            listener.close()
            raise
        finally:
            os.close(report)
        self.pid = self._child.pid
        self._listen = threading.Thread(target=self._hear, name="vmd-detached", daemon=True)
        self._listen.start()

    def stats(self) -> dict[str, Any]:
        """The last statistics that the server wrote; empty before the first."""
        return read_stats(self._directory)

    def forget(self) -> None:
        """Leave it running: it ends with its VMM. Call after the handshake; then only `pid` counts."""
        self._kept = True
        if self._listener is not None:
            self._listener.refuse_others()  # our copy only; the path is the server's now
            self._listener = None
        self._child.returncode = 0  # not ours to wait for any more

    def stop(self) -> None:
        """Ask it to end. Returns at once; idempotent."""
        if not self._kept and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Stop it, wait for its end, remove its socket. Idempotent; nothing after `forget`."""
        if self._kept:
            return
        self.stop()
        try:
            self._child.wait(limits.PAGES_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._listen.join()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _hear(self) -> None:
        with os.fdopen(self._report, "rb") as report:
            line = report.readline()
        try:
            news = json.loads(line)
        except ValueError:
            news = {"error": f"page server {self.pid} ended before the handshake; see {self._directory / LOG_FILE}"}
        if "vmm" in news:
            self.handshaken.set_result(news["vmm"])
        elif news.get("stopped"):
            self.handshaken.cancel()
        else:
            failure = HandshakeRefused if news.get("refused") else PagesFailed
            self.handshaken.set_exception(failure(news["error"]))


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


# ---- the child's side -----------------------------------------------------------------------


def main() -> int:
    """Serve as the order on the command line says; the exit code is that of `pages serve`."""
    signals = Signals()
    order = _Order(**json.loads(sys.argv[1]))
    os.set_inheritable(order.report, False)
    try:
        server = _serve(order)
    except VmdError as failure:
        _report(order.report, {"error": str(failure)})
        return _say_error(str(failure))
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

    def checked(page_size: int) -> Service:
        if page_size != order.page_size:
            raise HandshakeRefused(f"page size: expected the template's {order.page_size}, got {page_size}")
        return service

    listener = Listener.from_fd(order.listener, order.socket)
    server = PageServer(listener, Image(order.memory), checked, core=order.core, retry=False)
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
    """Tell the parent, who may have gone: then nobody wants to know."""
    if select.select([], [fd], [], 0)[1]:
        try:
            os.write(fd, json.dumps(news).encode() + b"\n")
        except BrokenPipeError:
            pass
        finally:
            os.close(fd)


def _say_error(line: str) -> int:
    say(f"vmd: error: {line}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
