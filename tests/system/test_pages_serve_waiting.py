"""`vmd pages serve`, before the handshake: which peers do not count, who is refused, how long it waits."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fakes.vmm import FakeVmm, eventually
from tests.system.pages_serve.command import PAIR_PAGES as PAGES
from tests.system.pages_serve.command import MakeMemory, MakeVmm, PageServer, Serve, serves

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd


def knock(path: Path, data: bytes = b"") -> None:
    """Connect, send, vanish."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        peer.sendall(data)


@pytest.mark.parametrize("data", [b"", b"["], ids=["at once", "after a byte"])
def test_a_peer_that_vanishes_does_not_count(pair: tuple[PageServer, FakeVmm], data: bytes) -> None:
    server, vmm = pair
    if data:
        vmm.connect(server.socket)
        vmm.send(data, "uffd")
        vmm.hang_up()
    else:
        knock(server.socket)
    eventually(server.lines, "a line for it")
    (line,) = server.lines()
    assert line.startswith("vmd: warning: ")
    assert f"pid {vmm.pid if data else os.getpid()}" in line
    vmm.handshake(server.socket)
    assert vmm.verdicts() == ["image"] * PAGES
    vmm.kill()
    server.ends(0)
    assert server.lines() == [line]


def test_a_peer_that_dies_in_its_handshake_does_not_count(
    pair: tuple[PageServer, FakeVmm], make_vmm: MakeVmm, make_memory: MakeMemory
) -> None:
    server, vmm = pair
    other = make_vmm(make_memory(1))
    other.connect(server.socket)
    other.send(b"[{", "uffd")
    other.kill()
    eventually(server.lines, "a line for it")
    assert f"peer pid {other.pid} " in server.stderr()
    vmm.handshake(server.socket)
    serves_after_warnings(server, vmm, 1)


def serves_after_warnings(server: PageServer, vmm: FakeVmm, lines: int) -> None:
    assert vmm.verdicts() == ["image"] * PAGES
    vmm.kill()
    server.ends(0)
    assert len(server.lines()) == lines
    assert all(line.startswith("vmd: warning: ") for line in server.lines())


@pytest.mark.seed(7)
def test_a_thousand_peers_that_vanish_leave_nothing(pair: tuple[PageServer, FakeVmm]) -> None:
    server, vmm = pair
    before = server.descriptors()
    for _ in range(1000):
        knock(server.socket)
    eventually(lambda: len(server.lines()) == 1000, "a line for each")
    assert server.descriptors() == before
    vmm.handshake(server.socket)
    serves_after_warnings(server, vmm, 1000)


@pytest.mark.seed(7)
def test_a_silent_peer_has_ten_seconds(pair: tuple[PageServer, FakeVmm]) -> None:
    server, vmm = pair
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(server.socket))
        since = time.monotonic()
        vmm.handshake(server.socket)  # waits in the queue behind it
        eventually(server.lines, "the silent one is given up", 15)
        assert 9.5 < time.monotonic() - since < 11
    assert "10 s" in server.stderr()
    serves_after_warnings(server, vmm, 1)


def test_peers_that_come_after_are_refused_at_once(pair: tuple[PageServer, FakeVmm]) -> None:
    server, vmm = pair
    with socket.socket(socket.AF_UNIX) as queued:
        vmm.connect(server.socket)
        queued.connect(str(server.socket))
        vmm.send(json.dumps(vmm.body()).encode(), "uffd")
        queued.settimeout(1)
        with suppress(ConnectionResetError):  # as good
            assert queued.recv(1) == b""
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(server.socket))
    assert server.socket.is_socket()
    serves(server, vmm)


# --- how long ----------------------------------------------------------------------------------------


@pytest.mark.seed(7)
@pytest.mark.parametrize("peer", ["none", "silent", "vanished"])
def test_accept_timeout_bounds_the_wait_for_a_good_handshake(
    serve_pages: Serve, make_memory: MakeMemory, peer: str
) -> None:
    server = serve_pages(make_memory(1), "--accept-timeout", "0.7")
    since = time.monotonic()
    with socket.socket(socket.AF_UNIX) as silent:
        if peer == "silent":
            silent.connect(str(server.socket))
        if peer == "vanished":
            knock(server.socket)
        server.ends(1)
    assert 0.3 < time.monotonic() - since < 1.2
    errors = [line for line in server.lines() if line.startswith("vmd: error: ")]
    assert len(errors) == 1
    assert "0.7 s" in errors[0]
    assert len(server.lines()) == (2 if peer == "vanished" else 1)
    assert server.stats()["state"] == "ended"
    assert not server.socket.exists()


def test_accept_timeout_does_not_bound_the_serving(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm
) -> None:
    memory = make_memory(PAGES)
    vmm = make_vmm(memory)
    server = serve_pages(memory, "--no-prefetch", "--accept-timeout", "0.5")
    vmm.handshake(server.socket)
    assert not server.has_ended(1.0)
    serves(server, vmm)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("peer", ["none", "connected", "half way"])
@pytest.mark.seed(7, 17)
def test_a_signal_ends_the_wait(pair: tuple[PageServer, FakeVmm], peer: str, number: signal.Signals) -> None:
    server, vmm = pair
    if peer != "none":
        vmm.connect(server.socket)
    if peer == "half way":
        vmm.send(b"[{", "uffd")
        eventually(lambda: any("userfaultfd" in link for link in server.descriptors()), "it has the descriptor")
    server.send(number)
    assert server.ends(0) < 0.5
    assert (server.stdout(), server.stderr()) == ("ready\n", "")
    assert server.stats()["state"] == "ended"
    assert not server.socket.exists()
