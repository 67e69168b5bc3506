"""A peer that lies, over a real socket, and the handshake that must see through it."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

from tests.fakes.vmm import eventually
from vmd.errors import VmdError
from vmd.pages import uffd
from vmd.pages.handshake import Handshake, Listener, receive

IMAGE_BYTES = 1 << 30
PROMPT_SECONDS = 1.0
GOOD: dict[str, Any] = {"base_host_virt_addr": 1 << 40, "size": 1 << 20, "offset": 1 << 16, "page_size": 4096}


def body(*changes: dict[str, Any]) -> bytes:
    """A handshake of one region for each change of the good one; a key changed to None is left out."""
    regions = [{**GOOD, **change} for change in changes or ({},)]
    return json.dumps([{key: value for key, value in each.items() if value is not None} for each in regions]).encode()


class Peer:
    """A VMM that says what it likes, played by the process of the test."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(str(path))

    def send(self, data: bytes, *kinds: str) -> None:
        """One message with descriptors of these kinds: ``uffd``, ``eventfd``, ``null``, ``named``."""
        fds = [_descriptor(kind) for kind in kinds]
        try:
            sent = socket.send_fds(self.socket, [data], fds) if fds else 0
            if data[sent:]:  # an empty send to a server that has refused us already would be an error
                self.socket.sendall(data[sent:])
        finally:
            for fd in fds:
                os.close(fd)

    def close(self) -> None:
        self.socket.close()


def _descriptor(kind: str) -> int:
    if kind == "uffd":
        return uffd.create()
    if kind == "named":  # the name of a memfd is anybody's to choose
        return os.memfd_create("a\nvmd: b\x1b[2J\udcff")
    return os.eventfd(0) if kind == "eventfd" else os.open("/dev/null", os.O_RDWR)


class Server:
    """Waits for a handshake in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.listener = Listener(path)
        self.path = path
        self.stop_fd = os.eventfd(0)
        self.warnings: list[str] = []
        self.outcome: Handshake | VmdError | None = None
        self._peers: list[Peer] = []
        self._thread: threading.Thread | None = None

    def wait_for_handshake(self, accept_seconds: float | None = None, retry: bool = False) -> None:
        """Begin to wait. Returns at once."""

        def run() -> None:
            try:
                self.outcome = receive(
                    self.listener, IMAGE_BYTES, self.stop_fd, accept_seconds, retry, self.warnings.append
                )
            except VmdError as failure:
                self.outcome = failure

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def connect(self) -> Peer:
        self._peers.append(Peer(self.path))
        return self._peers[-1]

    def stop(self) -> None:
        os.eventfd_write(self.stop_fd, 1)

    def is_waiting(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def result(self, seconds: float = 20.0) -> Handshake | VmdError | None:
        """What came of it, once it has ended."""
        eventually(lambda: not self.is_waiting(), "the wait for a handshake ends", seconds)
        return self.outcome

    def refusal(self, kind: type[VmdError]) -> str:
        """Its refusal: promptly, of exactly this kind, in one line that can be printed."""
        failure = self.result(PROMPT_SECONDS)
        assert type(failure) is kind, failure
        line = str(failure)
        assert line.startswith("handshake: ")
        assert "\n" not in line
        assert len(line) < 300
        return line

    def close(self) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join(20)
        if isinstance(self.outcome, Handshake):
            self.outcome.close()
        for peer in self._peers:
            peer.close()
        self.listener.close()
        os.close(self.stop_fd)
