"""Firecracker's API: HTTP/1.1 over a unix socket, one connection kept.

h11 parses; this module bounds. Every wait has an end: the reply, the bound, the VMM's death, a
cancellation, whichever comes first. A request that did not get its whole reply drops the
connection, so a late reply can never be taken for the next one's.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11

from .. import limits
from ..errors import TimedOut, VmmError

_RETRY_SECONDS = 0.0005
_CHUNK_BYTES = 65536

# Not there yet, nobody listens yet, backlog full: what a VMM that is starting answers.
_NOT_YET = (FileNotFoundError, ConnectionRefusedError, BlockingIOError)


class Api:
    """Talks to the VMM that listens on ``socket_path``. For one event loop; requests queue up.

    Errors are `VmmError` (the VMM said no, spoke nonsense, or is gone) and `TimedOut`.
    """

    def __init__(self, socket_path: Path) -> None:
        self.socket_path = socket_path
        self._turn = asyncio.Lock()
        self._http: h11.Connection | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self, deadline_seconds: float, alive: Callable[[], bool]) -> None:
        """Connect as soon as the VMM listens, asking every 0.5 ms.

        ``alive`` tells whether the process still runs: `VmmError` at once when not. `TimedOut`
        after ``deadline_seconds``.
        """
        try:
            async with asyncio.timeout(deadline_seconds):
                while True:
                    try:
                        return await self._open()
                    except _NOT_YET:
                        if not alive():
                            raise VmmError(f"connect {self.socket_path}: the VMM has exited") from None
                    except OSError as failure:
                        raise VmmError(f"connect {self.socket_path}: {_why(failure)}") from failure
                    await asyncio.sleep(_RETRY_SECONDS)
        except TimeoutError:
            raise TimedOut(f"connect {self.socket_path}: nobody listens after {deadline_seconds:g} s") from None

    async def request(
        self, method: str, path: str, body: dict[str, Any] | None, *, seconds: float
    ) -> dict[str, Any] | None:
        """One request; its reply's JSON object, or None where there is none (204).

        A status other than 2xx is a `VmmError` with Firecracker's ``fault_message`` and the status.
        ``seconds`` bounds all of it, the wait for earlier requests included: `TimedOut`, and what
        the VMM did is unknown.
        """
        what = f"{method} {path}"
        try:
            async with asyncio.timeout(seconds), self._turn:
                try:
                    status, reply = await self._exchange(method, path, body)
                except BaseException:
                    self.close()
                    raise
        except TimeoutError:
            raise TimedOut(f"{what}: no answer within {seconds:g} s") from None
        except h11.ProtocolError as failure:
            raise VmmError(f"{what}: the VMM does not speak HTTP: {failure}") from failure
        except OSError as failure:
            raise VmmError(f"{what}: the VMM is gone: {_why(failure)}") from failure
        return _judge(what, status, reply)

    def close(self) -> None:
        """Drop the connection; the next request makes a new one. Idempotent."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._http = self._reader = self._writer = None

    async def _open(self) -> None:
        # Through the directory's descriptor: sun_path holds 107 bytes, a state directory may be deeper.
        directory = os.open(self.socket_path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            address = f"/proc/self/fd/{directory}/{self.socket_path.name}"
            self._reader, self._writer = await asyncio.open_unix_connection(address, limit=_CHUNK_BYTES)
        finally:
            os.close(directory)
        self._http = h11.Connection(h11.CLIENT)

    async def _exchange(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, bytes]:
        if self._http is None:
            await self._open()
        assert self._http is not None
        assert self._writer is not None
        self._writer.write(_encode(self._http, method, path, body))
        await self._writer.drain()
        status, reply = await self._receive(self._http)
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:  # "Connection: close"
            self.close()
        return status, reply

    async def _receive(self, http: h11.Connection) -> tuple[int, bytes]:
        assert self._reader is not None
        status, body, received = 0, bytearray(), 0
        while True:
            event = http.next_event()
            if event is h11.NEED_DATA:
                chunk = await self._reader.read(_CHUNK_BYTES)
                if not chunk and http.their_state in (h11.IDLE, h11.SEND_RESPONSE):
                    raise ConnectionResetError(errno.ECONNRESET, "it closed the connection before its answer")
                received += len(chunk)
                if received > limits.VMM_REPLY_BYTES_MAX:
                    raise h11.RemoteProtocolError(f"a reply of more than {limits.VMM_REPLY_BYTES_MAX} bytes")
                http.receive_data(chunk)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return status, bytes(body)


def _encode(http: h11.Connection, method: str, path: str, body: dict[str, Any] | None) -> bytes:
    payload = b"" if body is None else json.dumps(body).encode()
    headers = [("Host", "localhost"), ("Accept", "application/json")]
    if body is not None:
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(payload)))]
    parts = [http.send(h11.Request(method=method, target=path, headers=headers))]
    if payload:
        parts.append(http.send(h11.Data(data=payload)))
    parts.append(http.send(h11.EndOfMessage()))
    return b"".join(part or b"" for part in parts)


def _judge(what: str, status: int, reply: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(reply) if reply.strip() else None
    except (ValueError, RecursionError):
        content = reply
    if not 200 <= status < 300:
        fault = content.get("fault_message") if isinstance(content, dict) else None
        text = fault if isinstance(fault, str) else reply.decode("utf-8", "replace")
        raise VmmError(f"{what}: {' '.join(text.split())[:2000]} (status {status})")
    if content is None or isinstance(content, dict):
        return content
    raise VmmError(f"{what}: the reply is not a JSON object: {reply[:100]!r}")


def _why(failure: OSError) -> str:
    return failure.strerror or str(failure)
