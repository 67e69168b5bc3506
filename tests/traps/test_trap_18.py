"""A handshake need not fit one buffer, nor begin or end where a read does; its descriptor is taken once and kept."""

from __future__ import annotations

import pytest

from tests.hostile.peer import Server, body
from vmd.errors import HandshakeRefused, PeerVanished
from vmd.pages.handshake import _READ_BYTES, Handshake

pytestmark = pytest.mark.needs_uffd


def body_of(size: int) -> bytes:
    """A good body of exactly so many bytes."""
    return body({"unknown": "x" * (size - len(body({"unknown": ""})))})


@pytest.mark.parametrize("whole_reads", [1, 2, 5])
@pytest.mark.parametrize("more", [-1, 0, 1, 2])  # the first byte is read alone
def test_a_body_that_ends_about_where_a_read_does(server: Server, whole_reads: int, more: int) -> None:
    server.wait_for_handshake()
    server.connect().send(body_of(whole_reads * _READ_BYTES + more), "uffd")
    handshake = server.result()
    assert isinstance(handshake, Handshake), handshake
    assert handshake.regions.guest_bytes == 1 << 20


def test_one_byte_and_the_descriptor_then_the_rest(server: Server) -> None:
    server.wait_for_handshake()
    peer, text = server.connect(), body_of(_READ_BYTES)
    peer.send(text[:1], "uffd")
    peer.send(text[1:-1])
    assert server.is_waiting()
    peer.send(text[-1:])
    assert isinstance(server.result(), Handshake)


@pytest.mark.parametrize(
    ("sent", "descriptors", "refusal"),
    [(b"", [], PeerVanished), (b"[", [], HandshakeRefused), (b"[", ["uffd"] * 2, HandshakeRefused)],
)  # fmt: skip
def test_no_byte_no_descriptor_or_two(
    server: Server, sent: bytes, descriptors: list[str], refusal: type[Exception]
) -> None:
    server.wait_for_handshake()
    peer = server.connect()
    if sent:
        peer.send(sent, *descriptors)
    peer.close()
    assert type(server.result(1.0)) is refusal
