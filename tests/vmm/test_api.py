"""The API client against peers that lie, stall and never end."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vmm.conftest import run
from vmd import limits
from vmd.errors import TimedOut, VmmError
from vmd.vmm.api import Api

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n" + b'{"a": 1}\n'
NO_CONTENT = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"


def says(*pieces: bytes, then: str = "close") -> Answer:
    """A peer that answers the first request with ``pieces``, then closes or stays."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.005)
        if then == "stay":
            await reader.read()

    return answer


def closing(answer: Answer) -> Answer:
    """A peer like ``answer`` that takes an end of its own for granted."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                await answer(reader, writer)
        finally:
            writer.transport.abort()

    return serve


def request(
    socket: Path, answer: Answer, *, seconds: float = 5, body: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """One request to a peer that behaves like ``answer``."""

    async def story() -> dict[str, Any] | None:
        server = await asyncio.start_unix_server(closing(answer), socket)
        api = Api(socket)
        try:
            await api.connect(1, lambda: True)
            return await api.request("GET", "/x", body, seconds=seconds)
        finally:
            api.close()
            server.close()
            await server.wait_closed()
            await asyncio.sleep(0.02)

    try:
        return run(story())
    finally:
        socket.unlink()


@pytest.fixture
def socket(run_dir: Path) -> Path:
    return run_dir / "api.sock"


def test_an_object_in_pieces(socket: Path) -> None:
    assert request(socket, says(*(bytes([byte]) for byte in OK), then="stay")) == {"a": 1}
    assert request(socket, says(b"HTTP/1.1 100 Continue\r\n\r\n", OK)) == {"a": 1}
    assert request(socket, says(NO_CONTENT, then="stay")) is None


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (b'{"fault_message": "no such\\n  thing"}', "GET /x: no such thing (status 400)"),
        (b'{"other": 1}', 'GET /x: {"other": 1} (status 400)'),
        (b'{"fault_message": 3}', 'GET /x: {"fault_message": 3} (status 400)'),
        (b"[1]", "GET /x: [1] (status 400)"),
        (b"\xff!", "GET /x: \N{REPLACEMENT CHARACTER}! (status 400)"),
        (b"", "GET /x:  (status 400)"),
    ],
)
def test_a_refusal_keeps_its_words(socket: Path, reply: bytes, text: str) -> None:
    head = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(reply)
    with pytest.raises(VmmError) as refused:
        request(socket, says(head + reply))
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([], "the VMM is gone: it closed the connection before its answer"),
        ([b"HTTP/1.1 200 OK\r\nConte"], "the VMM is gone: it closed the connection before its answer"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"], "the VMM does not speak HTTP: .*expected 9"),
        ([b"hello\r\n\r\n"], "the VMM does not speak HTTP: "),
        ([b"\0" * 100 + b"\r\n\r\n"], "the VMM does not speak HTTP: "),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n"], "the VMM does not speak HTTP: "),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n[1]"], "the reply is not a JSON object: "),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{{{"], "the reply is not a JSON object: "),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 90000\r\n\r\n" + b"[" * 90000], "the reply is not a JSON object: "),
    ],
)
def test_nonsense_is_an_error_at_once(socket: Path, pieces: list[bytes], why: str) -> None:
    began = time.monotonic()
    with pytest.raises(VmmError, match=f"^GET /x: {why}"):
        request(socket, says(*pieces))
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"x" * 65536),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x" * 65536),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2048),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 8192),
    ],
    ids=["body", "header", "continue", "chunks"],
)
def test_a_reply_without_end_is_cut_short(socket: Path, head: bytes, piece: bytes) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(head)
        while True:
            writer.write(piece)
            sent += len(piece)
            await writer.drain()

    with pytest.raises(VmmError, match=r"^GET /x: the VMM does not speak HTTP: "):
        request(socket, flood, seconds=20)
    assert sent < 4 * limits.VMM_REPLY_BYTES_MAX


def test_silence_is_bounded(socket: Path) -> None:
    with pytest.raises(TimedOut, match=r"^GET /x: no answer within 0.2 s$"):
        request(socket, says(then="stay"), seconds=0.2)
    with pytest.raises(TimedOut):
        request(socket, says(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", then="stay"), seconds=0.2)


def test_a_peer_that_does_not_read_is_bounded(socket: Path) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(0.5)

    with pytest.raises(TimedOut):
        request(socket, deaf, body={"a": "x" * (8 << 20)}, seconds=0.2)


def test_a_closed_connection_is_made_anew(socket: Path) -> None:
    connections = 0

    async def story() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await reader.read(65536)
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            writer.close()

        server = await asyncio.start_unix_server(serve, socket)
        api = Api(socket)
        await api.connect(1, lambda: True)
        for _ in range(3):
            assert await api.request("GET", "/x", None, seconds=5) is None
        api.close()
        api.close()
        server.close()
        await server.wait_closed()

    run(story())
    socket.unlink()
    assert connections == 3


def test_connecting_waits_for_the_listener_and_for_the_living_only(socket: Path) -> None:
    async def appears() -> None:
        api = Api(socket)
        connecting = asyncio.ensure_future(api.connect(5, lambda: True))
        await asyncio.sleep(0.05)
        server = await asyncio.start_unix_server(closing(says()), socket)
        await connecting
        api.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.02)

    run(appears())
    with pytest.raises(VmmError, match=r"^connect .*/api.sock: the VMM has exited$"):  # nobody listens there now
        run(Api(socket).connect(30, lambda: False))
    socket.unlink()
    with pytest.raises(TimedOut, match=r"^connect .*/api.sock: nobody listens after 0.1 s$"):
        run(Api(socket).connect(0.1, lambda: True))
    with pytest.raises(VmmError, match=r"^GET /x: the VMM is gone: No such file or directory$"):
        run(Api(socket).request("GET", "/x", None, seconds=5))
