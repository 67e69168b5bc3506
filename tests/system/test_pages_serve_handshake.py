"""`vmd pages serve`, the handshake: what is taken, what is refused, who is waited for and for how long."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.fakes.vmm import FakeVmm, Span
from tests.system.pages_serve.command import PAIR_PAGES as PAGES
from tests.system.pages_serve.command import MakeMemory, MakeVmm, PageServer, Serve, serves

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd

Body = list[dict[str, Any]]


# --- good ones -------------------------------------------------------------------------------------


def _only_kib(body: Body) -> None:
    for region in body:
        del region["page_size"]


def _both_differ(body: Body) -> None:
    for region in body:
        region["page_size_kib"] = 4


def _unknown_keys(body: Body) -> None:
    for region in body:
        region |= {"name": "ram", "nested": {"a": [1, None, {"b": "]"}]}, "float": 1.5e3, "é": '\\"]'}


@pytest.mark.seed(4)
@pytest.mark.parametrize("change", [_only_kib, _both_differ, _unknown_keys])
def test_forms_of_a_good_handshake(pair: tuple[PageServer, FakeVmm], change: Callable[[Body], None]) -> None:
    server, vmm = pair
    body = vmm.body()
    change(body)
    vmm.handshake(server.socket, body)
    assert server.when(state="serving")["page_size"] == 4096
    serves(server, vmm)


@pytest.mark.seed(6)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_a_body_in_pieces(pair: tuple[PageServer, FakeVmm], size: int) -> None:
    server, vmm = pair
    text = b" \n" + json.dumps(vmm.body()).encode() + b" \r\n\t "
    vmm.connect(server.socket)
    vmm.send(text[:1], "uffd")
    for at in range(1, len(text), size):
        vmm.send(text[at : at + size])
    serves(server, vmm)


@pytest.mark.seed(6)
def test_a_body_just_below_the_limit(pair: tuple[PageServer, FakeVmm]) -> None:
    server, vmm = pair
    body = vmm.body(name="")
    body[0]["name"] = "x" * ((1 << 20) - len(json.dumps(body)))
    vmm.handshake(server.socket, body)
    serves(server, vmm)


@pytest.mark.seed(3, 6)
@pytest.mark.parametrize("core", ["native", "reference"])
def test_eight_thousand_regions(serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, core: str) -> None:
    count = 8000
    memory = make_memory(count)
    server = serve_pages(memory, core=core)
    # Address order and file order are opposite.
    vmm = make_vmm(memory, [Span(1, count - 1 - at) for at in range(count)])
    short = [
        {key: region[key] for key in ("base_host_virt_addr", "size", "offset", "page_size")} for region in vmm.body()
    ]
    vmm.handshake(server.socket, short)
    assert server.when(state="serving")["regions"] == count
    serves(server, vmm, count)


@pytest.mark.seed(3)
def test_regions_in_any_order_that_leave_parts_of_the_file_out(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm
) -> None:
    memory = make_memory(40)
    server = serve_pages(memory)
    vmm = make_vmm(memory, [Span(4, 30), Span(8, 2), Span(2, 20)])
    vmm.handshake(server.socket, vmm.body([2, 0, 1]))
    assert server.when(state="serving")["guest_bytes"] == 14 * 4096
    serves(server, vmm, 14)


# --- wrong ones ------------------------------------------------------------------------------------


def _with(**changes: object) -> Callable[[Body], Body]:
    """Changes the first of two regions."""

    def change(body: Body) -> Body:
        return [{**body[0], **changes}, *body[1:]]

    return change


def _without(key: str) -> Callable[[Body], Body]:
    return lambda body: [{name: value for name, value in body[0].items() if name != key}, *body[1:]]


def _without_page_size(body: Body) -> Body:
    return _without("page_size_kib")(_without("page_size")(body))


def _shifted(key: str, by: int) -> Callable[[Body], Body]:
    return lambda body: _with(**{key: body[0][key] + by})(body)


def _all_sizes(size: object) -> Callable[[Body], Body]:
    return lambda body: [{**region, "page_size": size} for region in body]


def _same_address(body: Body) -> Body:
    return _with(base_host_virt_addr=body[1]["base_host_virt_addr"] - 4096)(body)


_WRONG: dict[str, tuple[Callable[[Body], object], str]] = {
    "empty array": (lambda body: [], "empty"),
    "no array": (lambda body: body[0], "array"),
    "array of numbers": (lambda body: [1], "object"),
    "array of arrays": (lambda body: [body], "object"),
    "null": (lambda body: None, "array"),
    "base missing": (_without("base_host_virt_addr"), "base_host_virt_addr is missing"),
    "size missing": (_without("size"), "size is missing"),
    "offset missing": (_without("offset"), "offset is missing"),
    "page sizes missing": (_without_page_size, "page_size_kib is missing"),
    "base negative": (_with(base_host_virt_addr=-4096), "base_host_virt_addr"),
    "size a float": (_with(size=4096.0), "size"),
    "size a string": (_with(size="4096"), "size"),
    "offset null": (_with(offset=None), "offset"),
    "size true": (_with(size=True), "size"),
    "page size null": (_all_sizes(None), "page_size"),
    "page size of 16 KiB": (_all_sizes(16384), "page size.*16384"),
    "page size 4": (_all_sizes(4), "page size.*4"),
    "page size 0": (_all_sizes(0), "page size.*0"),
    "page sizes that differ": (_with(page_size=2 << 20), "page size"),
    "size 0": (_with(size=0), "size 0"),
    "base not aligned": (_shifted("base_host_virt_addr", 1), "aligned"),
    "size not aligned": (_shifted("size", -8), "aligned"),
    "offset not aligned": (_shifted("offset", 512), "aligned"),
    "past the end of the file": (_with(offset=5 * 4096), "past the end"),
    "offset + size past 2^64": (_with(offset=(1 << 64) - 4096), "past the end"),
    "base + size past 2^64": (_with(base_host_virt_addr=(1 << 64) - 4096), "2\\^64"),
    "a number past 2^64": (_with(size=1 << 64), "size"),
    "overlap in address": (_same_address, "overlap in address"),
    "overlap in the file": (_with(offset=3 * 4096), "overlap in the memory file"),
}


def send(vmm: FakeVmm, data: bytes, *descriptors: str) -> None:
    """Send what may be refused before it was sent completely."""
    with suppress(BrokenPipeError, ConnectionResetError):
        vmm.send(data, *descriptors)


def refuses(server: PageServer, since: float, *patterns: str) -> None:
    """It ended with one line and code 1 within a second; nothing was served."""
    server.refused("handshake", *patterns)
    assert time.monotonic() - since < 1
    assert not server.socket.exists()
    assert server.stats()["state"] == "ended"


@pytest.mark.seed(5)
@pytest.mark.parametrize("name", list(_WRONG))
def test_a_wrong_map_is_refused(serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, name: str) -> None:
    change, why = _WRONG[name]
    memory = make_memory(PAGES)
    server = serve_pages(memory)
    vmm = make_vmm(memory, [Span(4, 0), Span(4, 4)])
    since = time.monotonic()
    vmm.connect(server.socket)
    send(vmm, json.dumps(change(copy.deepcopy(vmm.body()))).encode(), "uffd")
    refuses(server, since, why)
    assert vmm.is_alive()


_HOPELESS = {
    "no JSON": (b"hello", "JSON"),
    "an object": (b'{"base', "array"),
    "a number in the array": (b"[1", "object"),
    "a comma too much": (b'[{"size":1},,', "object"),
    "no UTF-8": (b'[{"\xff', "UTF-8"),
    "a zero byte": (b"\0", "array"),
    "more after the array": (b"[{}] x", "white space"),
    "two arrays": (b"[{}][", "white space"),
    "a bad number": (b'[{"size":0x', "value"),
}


@pytest.mark.seed(5)
@pytest.mark.parametrize("name", list(_HOPELESS))
def test_what_can_no_longer_become_an_array_of_objects_is_refused_at_once(
    pair: tuple[PageServer, FakeVmm], name: str
) -> None:
    server, vmm = pair
    text, why = _HOPELESS[name]
    since = time.monotonic()
    vmm.connect(server.socket)
    send(vmm, text, "uffd")  # and the connection stays open: nothing tells the end but the text
    refuses(server, since, why)


@pytest.mark.seed(5)
def test_a_body_past_the_limit_is_refused(pair: tuple[PageServer, FakeVmm]) -> None:
    server, vmm = pair
    since = time.monotonic()
    vmm.connect(server.socket)
    vmm.send(b"[", "uffd")
    send(vmm, b" " * (1 << 20))
    refuses(server, since, "1048576")


@pytest.mark.seed(5)
@pytest.mark.parametrize(
    ("descriptors", "why"),
    [
        ((), "got 0"),
        (("uffd", "uffd"), "got 2"),
        (("uffd",) * 250, "got 250"),
        (("null",), "userfaultfd.*null"),
        (("eventfd",), "userfaultfd.*eventfd"),
    ],
    ids=["none", "two", "many", "a file", "an eventfd"],
)
def test_other_than_one_userfaultfd_is_refused(
    pair: tuple[PageServer, FakeVmm], descriptors: tuple[str, ...], why: str
) -> None:
    server, vmm = pair
    since = time.monotonic()
    vmm.connect(server.socket)
    send(vmm, json.dumps(vmm.body()).encode(), *descriptors)
    refuses(server, since, why)


@pytest.mark.seed(5)
def test_a_descriptor_that_comes_late_is_refused(pair: tuple[PageServer, FakeVmm]) -> None:
    server, vmm = pair
    since = time.monotonic()
    vmm.connect(server.socket)
    send(vmm, b"[")
    refuses(server, since, "got 0")


@pytest.mark.seed(5)
def test_a_second_descriptor_that_comes_later_is_refused(pair: tuple[PageServer, FakeVmm]) -> None:
    server, vmm = pair
    since = time.monotonic()
    vmm.connect(server.socket)
    vmm.send(b"[", "uffd")
    send(vmm, b" ", "uffd")
    refuses(server, since, "later message")
