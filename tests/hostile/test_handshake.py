"""Each wrong handshake is refused at once, with one line that says what was expected and what came."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

from tests.fakes.vmm import eventually
from tests.hostile.peer import GOOD, IMAGE_BYTES, Server, body
from vmd import limits
from vmd.errors import HandshakeRefused, PeerVanished, TimedOut
from vmd.pages.handshake import Handshake

pytestmark = pytest.mark.needs_uffd

PAGE = 4096


def good(server: Server) -> Handshake:
    handshake = server.result()
    assert isinstance(handshake, Handshake), handshake
    return handshake


# --- what is right -----------------------------------------------------------------------------------


@pytest.mark.seed(4)
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"page_size": None, "page_size_kib": PAGE},
        {"page_size_kib": 7},
        {"page_size_kib": "four"},
        {"unknown": {"nested": [1, {"deep": None}], "text": '\\"]}[{'}},
        {"offset": 0},
        {"size": IMAGE_BYTES, "offset": 0},
    ],
    ids=str,
)
def test_accepted(server: Server, change: dict[str, Any]) -> None:
    server.wait_for_handshake()
    server.connect().send(body(change), "uffd")
    handshake = good(server)
    assert handshake.vmm_pid == os.getpid()
    assert handshake.regions.page_size == PAGE
    assert not os.get_blocking(handshake.uffd)


@pytest.mark.parametrize("padding", [b" ", b"\t\r\n  \n"])
def test_white_space_around_it(server: Server, padding: bytes) -> None:
    server.wait_for_handshake()
    server.connect().send(padding + body() + padding, "uffd")
    good(server)


@pytest.mark.seed(6)
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_in_pieces(server: Server, size: int) -> None:
    text = body({"note": 'a "quoted" \\ [thing] \u00fc'}, {"base_host_virt_addr": 1 << 41, "offset": 1 << 21})
    server.wait_for_handshake()
    peer = server.connect()
    peer.send(text[:1], "uffd")
    for at in range(1, len(text), size):
        assert server.is_waiting()
        peer.send(text[at : at + size])
    assert len(good(server).regions) == 2


@pytest.mark.seed(6)
def test_thousands_of_regions(server: Server) -> None:
    changes = [{"base_host_virt_addr": at << 24, "size": PAGE, "offset": at * PAGE} for at in range(8000)]
    text = body(*changes)
    assert 600_000 < len(text) < limits.HANDSHAKE_BODY_BYTES_MAX
    server.wait_for_handshake()
    server.connect().send(text, "uffd")
    assert good(server).regions.pages == 8000


def test_a_peer_that_closes_right_after_it(server: Server) -> None:
    server.wait_for_handshake()
    peer = server.connect()
    peer.send(body(), "uffd")
    peer.close()
    good(server)


# --- what is wrong -----------------------------------------------------------------------------------

PAST = 1 << 64


@pytest.mark.seed(5)
@pytest.mark.parametrize(
    ("sent", "says"),
    [
        (b"[]", "empty array"),
        (b"  [ ] ", "empty array"),
        (b"{}", "array"),
        (b"null", "array"),
        (b"hello", "array"),
        (b"\x00", "array"),
        (b"\xff\xfe", "UTF-8"),
        (b'[{"a":"\xc3\x28"', "UTF-8"),
        (b"\xef\xbb\xbf[]", "array"),
        (b"[1]", "object"),
        (b"[null", "object"),
        (b"[[", "object"),
        (b"[{}]", "missing"),
        (b"[{},]", "object"),
        (b"[,", "object"),
        (b"[{'a'", "key"),
        (b"[{]", "key"),
        (b'[{"a":1,}', "key"),
        (b'[{"a" 1', "colon"),
        (b'[{"a":}', "value"),
        (b'[{"a":tru ', "value"),
        (b'[{"a":NaN', "value"),
        (b'[{"a":Infinity', "value"),
        (b'[{"a":01', "value"),
        (b'[{"a":+1', "value"),
        (b'[{"a":1.', None),
        (b'[{"a":1e,', "value"),
        (b'[{"a":"\n', "control character"),
        (b'[{"a":"\\x', "escape"),
        (b'[{"a":"\\u12g', "escape"),
        (b'[{"a":[}', "value"),
        (b"[{}}", "comma"),
        (body() + b"x", "white space"),
        (body() + b"[", "white space"),
        (body() + b"\xe2", "white space"),  # a character that has only begun
        (body() + b"]", "white space"),
        (body() + b"\x00", "white space"),
    ],
    ids=repr,
)
def test_not_an_array_of_objects(server: Server, sent: bytes, says: str | None) -> None:
    server.wait_for_handshake()
    peer = server.connect()
    peer.send(sent, "uffd")
    if says is None:  # more could still make it right
        peer.close()
        server.refusal(PeerVanished)
        return
    assert says in server.refusal(HandshakeRefused)  # though the peer keeps its end open


@pytest.mark.seed(5)
@pytest.mark.parametrize("key", ["base_host_virt_addr", "size", "offset", "page_size"])
@pytest.mark.parametrize(
    "value",
    [True, False, -1, 1.0, 4096.5, 1e30, "4096", [], {}, PAST, -PAST, 10**400, "x" * 5000],
    ids=lambda v: repr(v)[:12],
)
def test_not_a_whole_number(server: Server, key: str, value: object) -> None:
    server.wait_for_handshake()
    server.connect().send(body({}, {key: value}), "uffd")
    line = server.refusal(HandshakeRefused)
    assert "region 1" in line
    assert key in line


@pytest.mark.seed(5)
@pytest.mark.parametrize("key", ["base_host_virt_addr", "size", "offset", "page_size"])
def test_null_or_missing(server: Server, key: str) -> None:
    server.wait_for_handshake()
    server.connect().send(body({key: None}), "uffd")
    wanted = "page_size_kib" if key == "page_size" else key
    assert f"{wanted} is missing" in server.refusal(HandshakeRefused)


def test_null_is_no_number(server: Server) -> None:
    server.wait_for_handshake()
    server.connect().send(json.dumps([{**GOOD, "page_size": None, "page_size_kib": PAGE}]).encode(), "uffd")
    assert "page_size" in server.refusal(HandshakeRefused)


@pytest.mark.seed(5)
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([{"page_size": 0}], "page size"),
        ([{"page_size": 512}], "page size"),
        ([{"page_size": 8192}], "page size"),
        ([{"page_size": 1 << 30}], "page size"),
        ([{"page_size": None, "page_size_kib": 4}], "page size"),
        ([{}, {"page_size": 2 << 20}], "region 1: page size"),
        ([{"size": 0}], "size 0"),
        ([{"size": PAGE + 1}], "not aligned"),
        ([{"offset": 17}], "not aligned"),
        ([{"base_host_virt_addr": 4097}], "not aligned"),
        ([{"page_size": 2 << 20}], "not aligned"),
        ([{"offset": IMAGE_BYTES}], "past the end"),
        ([{"size": IMAGE_BYTES}], "past the end"),
        ([{"size": PAST - PAGE, "offset": PAST - PAGE, "base_host_virt_addr": 0}], "past the end"),
        ([{"base_host_virt_addr": PAST - PAGE, "size": 2 * PAGE}], "past 2^64"),
        ([{}, {}], "overlap in address"),
        ([{}, {"base_host_virt_addr": (1 << 40) + (1 << 20) - PAGE, "offset": 1 << 28}], "overlap in address"),
        ([{}, {"base_host_virt_addr": 1 << 41}], "overlap in the memory file"),
        ([{"base_host_virt_addr": 1 << 41, "offset": (1 << 16) + (1 << 20) - PAGE}, {}], "overlap in the memory file"),
    ],
    ids=str,
)
def test_a_map_that_is_wrong(server: Server, changes: list[dict[str, Any]], says: str) -> None:
    server.wait_for_handshake()
    server.connect().send(body(*changes), "uffd")
    assert says in server.refusal(HandshakeRefused)


def test_deep_nesting(server: Server) -> None:
    depth = 200_000
    server.wait_for_handshake()
    server.connect().send(b'[{"a":' + b"[" * depth + b"]" * depth + b"}]", "uffd")
    assert "nested too deeply" in server.refusal(HandshakeRefused)


def test_a_body_without_end(server: Server) -> None:
    server.wait_for_handshake()
    peer = server.connect()
    peer.send(b"[", "uffd")
    with pytest.raises(ConnectionError):  # noqa: PT012  (any of them may be the one)
        for _ in range(limits.HANDSHAKE_BODY_BYTES_MAX // 1000):
            peer.send(b" " * 2000)
    assert str(limits.HANDSHAKE_BODY_BYTES_MAX) in server.refusal(HandshakeRefused)


def test_white_space_without_end_after_it(server: Server) -> None:
    server.wait_for_handshake()
    peer = server.connect()
    peer.send(body() + b" " * 10_000, "uffd")
    good(server)


# --- descriptors -------------------------------------------------------------------------------------


@pytest.mark.seed(5)
@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ([], "got 0"),
        (["uffd", "uffd"], "got 2"),
        (["uffd"] + ["null"] * 252, "got 253"),
        (["null"], "/dev/null"),
        (["eventfd"], "[eventfd]"),
        (["named"], r"/memfd:a\nvmd: b\x1b[2J\udcff"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_not_one_userfaultfd(server: Server, kinds: list[str], says: str) -> None:
    server.wait_for_handshake()
    server.connect().send(body(), *kinds)
    assert says in server.refusal(HandshakeRefused)


@pytest.mark.seed(5)
def test_the_descriptor_comes_with_the_second_message(server: Server) -> None:
    text = body()
    peer = server.connect()  # both are there before the server looks: it must still tell them apart
    peer.send(text[:10])
    peer.send(text[10:], "uffd")
    server.wait_for_handshake()
    assert "got 0" in server.refusal(HandshakeRefused)


@pytest.mark.seed(5)
@pytest.mark.parametrize("text", [body()[10:], body()[10:-1], b" "])
def test_another_descriptor_comes_later(server: Server, text: bytes) -> None:
    peer = server.connect()
    peer.send(body() if text == b" " else body()[:10], "uffd")
    peer.send(text, "uffd")
    server.wait_for_handshake()
    assert "later message" in server.refusal(HandshakeRefused)


# --- peers that go, or stay silent -------------------------------------------------------------------


@pytest.mark.seed(5, 7)
@pytest.mark.parametrize("sent", [b"", b"[", b"[ {", body()[:-1], b'[{"a": "'], ids=repr)
def test_a_peer_that_goes_too_early(server: Server, sent: bytes) -> None:
    server.wait_for_handshake()
    peer = server.connect()
    if sent:
        peer.send(sent, "uffd")
    peer.close()
    line = server.refusal(PeerVanished)
    assert f"pid {os.getpid()} disconnected" in line
    assert f"({len(sent)} bytes)" in line


@pytest.mark.seed(7)
def test_one_warning_for_each_peer_that_went_and_the_next_is_served(server: Server) -> None:
    server.wait_for_handshake(retry=True)
    for sent in (b"", b"[{"):
        peer = server.connect()
        if sent:
            peer.send(sent, "uffd")
        peer.close()
    eventually(lambda: len(server.warnings) == 2, "two warnings")
    server.connect().send(body(), "uffd")
    good(server)
    assert all("waiting for another" in line and "\n" not in line for line in server.warnings)


def test_a_wrong_handshake_is_final_even_with_retry(server: Server) -> None:
    server.wait_for_handshake(retry=True)
    server.connect().send(b"[]", "uffd")
    server.refusal(HandshakeRefused)
    assert server.warnings == []


@pytest.mark.seed(7)
@pytest.mark.parametrize("dribble", [False, True])
def test_a_silent_peer_and_one_that_dribbles(server: Server, short_patience: float, dribble: bool) -> None:
    start = time.monotonic()
    server.wait_for_handshake()
    peer = server.connect()
    peer.send(b"[", "uffd")
    while dribble and server.is_waiting() and time.monotonic() < start + 10:
        try:
            peer.send(b" ")
        except ConnectionError:
            break
        time.sleep(0.01)
    line = str(server.result())
    assert short_patience <= time.monotonic() - start < short_patience + 1
    assert "was not done within 0.3 s" in line


@pytest.mark.seed(7)
@pytest.mark.parametrize("connected", [False, True])
def test_the_whole_wait_is_bounded(server: Server, connected: bool) -> None:
    if connected:
        server.connect().send(b"[", "uffd")
    start = time.monotonic()
    server.wait_for_handshake(accept_seconds=0.2, retry=True)
    failure = server.result()
    assert isinstance(failure, TimedOut)
    assert 0.2 <= time.monotonic() - start < 1.2
    assert server.warnings == []


@pytest.mark.seed(7, 17)
@pytest.mark.parametrize("connected", [False, True])
def test_stop_ends_the_wait_at_once(server: Server, connected: bool) -> None:
    if connected:
        server.connect().send(b"[", "uffd")
    server.wait_for_handshake()
    start = time.monotonic()
    server.stop()
    assert server.result() is None
    assert time.monotonic() - start < 0.5


def test_many_liars_leave_nothing(server: Server) -> None:
    server.wait_for_handshake(retry=True)
    for _ in range(50):
        peer = server.connect()
        peer.send(b"[{", "uffd")
        peer.close()
    server.connect().send(body(), "uffd")
    good(server)
    assert len(server.warnings) == 50
