"""Clients that mean ill, or are broken: each is answered or hung up on, and the VMs are served all the while."""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.pager.world import BYE, GONE, PUBLISH, READY, REPLY, SERVE, STATUS, SYNC, Host, Peer, Vm, fds

STRANGER = 65534
SEED, JUNK = 3, 300
PACKET_BYTES_MAX = 1 << 16


@pytest.fixture
def vm(host: Host) -> Vm:
    """One that is served, with a standby beside."""
    made = host("a").serve()
    host.pids()
    return made


def is_hung_up(peer: Peer) -> bool:
    """Whether the pager hangs up; answers before that are passed over."""
    while peer.answer() is not None:
        pass
    return True


def test_junk_is_refused_packet_by_packet(host: Host, vm: Vm) -> None:
    pids, random_ = host.pids(), random.Random(SEED)
    with host.knock() as peer:
        before = fds(pids)
        for _ in range(JUNK):
            packet = random_.randbytes(random_.randrange(1, 200))
            peer.send(random_.choice([b"", b"vmdp\1\0", b"vmdp"]) + packet, [0] * random_.randrange(5))
            assert str(peer.answer()).startswith("refused: ")
        eventually(lambda: fds(pids) == before, "nothing stays open")
    assert vm.is_whole()
    assert host.pids() == pids
    assert host.log() == []


@pytest.mark.parametrize(
    ("packet", "count", "why"),
    [
        (b"vmdp\1\0\3\0" + bytes(PACKET_BYTES_MAX), 0, "too long, or too many descriptors"),
        (b"vmdp\1\0\1\0a", 13, "too long, or too many descriptors"),
        (b"vmdp\1\0\1\0a", 253, "too long, or too many descriptors"),
        (b"vmdp\2\0\3\0", 0, "expected version 1 of the protocol, got 2"),
        (b"vmdp\1\0\x63\0", 0, "there is no message of kind 99"),
        (b"vmdp\1\0\3\0x", 4, "expected nothing more, got 1 bytes"),
    ],
)
def test_a_packet_that_is_none(host: Host, vm: Vm, packet: bytes, count: int, why: str) -> None:
    pids = host.pids()
    with host.knock() as peer, Path(os.devnull).open() as null:
        before = fds(pids)
        peer.send(packet, [null.fileno()] * count)
        assert peer.answer() == f"refused: {why}"
        eventually(lambda: fds(pids) == before, "nothing stays open")
    assert vm.is_whole()


def test_an_empty_packet_is_a_hang_up(host: Host, vm: Vm) -> None:
    with host.knock() as peer, Path(os.devnull).open() as null:
        peer.send(b"", [null.fileno()])
        assert is_hung_up(peer)
    assert vm.is_whole()


@pytest.mark.parametrize("kind", [REPLY, GONE, SYNC, READY, BYE])
def test_what_only_pager_and_standby_say_to_each_other(host: Host, vm: Vm, kind: int) -> None:
    pids = host.pids()
    with host.knock() as peer:
        peer.say(kind, {GONE: b"a", REPLY: bytes(8)}.get(kind, b""))
        assert str(peer.answer()).startswith("refused: not for a client to say: ")
    assert host.pids() == pids
    assert host.served() == ["a"]
    assert vm.is_whole()


def test_descriptors_with_a_message_that_has_none(host: Host, vm: Vm) -> None:
    pids = host.pids()
    with host.knock() as peer:
        before = fds(pids)
        for kind, rest in ((STATUS, b""), (PUBLISH, b"a")):
            peer.say(kind, rest, [0, 0, 0])
            assert not str(peer.answer()).startswith("refused")
        eventually(lambda: fds(pids) == before, "nothing stays open")


def test_many_who_say_nothing_keep_nobody_out(host: Host, vm: Vm) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(Peer(host.socket)) for _ in range(100)]
        with host.connect() as control:  # behind all of them
            assert "vm a " in control.status()
        assert all(is_hung_up(peer) for peer in silent)
    assert vm.is_whole()


def test_two_hundred_at_once_are_answered(host: Host, vm: Vm) -> None:
    with ExitStack() as stack:
        peers = []
        for _ in range(200):
            peers.append(stack.enter_context(Peer(host.socket)))
            peers[-1].say(STATUS)
        assert all("vm a " in (peer.answer() or "") for peer in peers)
    assert vm.is_whole()


def test_who_says_nothing_does_not_keep_the_pager_alive(host: Host) -> None:
    with host.knock():
        eventually(lambda: not host.processes(), "the pager ends", 5.0)


def say_for_long(peer: Peer) -> None:
    for _ in range(100_000):
        peer.say(STATUS)


def test_who_never_reads_is_hung_up_on(host: Host, vm: Vm) -> None:
    with host.knock() as peer:
        with pytest.raises(ConnectionError):
            say_for_long(peer)
        assert vm.is_whole()


def test_who_goes_away_without_reading_his_answer(host: Host, vm: Vm) -> None:
    for _ in range(50):
        peer = Peer(host.socket)
        peer.say(STATUS)
        peer.socket.close()
    assert vm.is_whole()
    assert host.served() == ["a"]
    assert host.log() == []


def test_a_stream_socket_gets_nowhere(host: Host, vm: Vm) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream, pytest.raises(OSError, match="wrong type"):
        stream.connect(str(host.socket))


def test_a_stranger_is_not_heard_even_where_he_can_connect(host: Host, vm: Vm) -> None:
    """Where the socket's mode lets nobody in, as it is; and where somebody has opened it to all."""
    assert as_stranger(host) == "PermissionError"
    host.socket.chmod(0o666)
    host.run_dir.chmod(0o711)
    assert as_stranger(host) == "hung up"
    assert host.served() == ["a"]


def as_stranger(host: Host) -> str:
    """How the pager treats a process of another user that asks for its status."""
    ours, theirs = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.chdir(host.run_dir)
            os.setgroups([])
            os.setresgid(STRANGER, STRANGER, STRANGER)
            os.setresuid(STRANGER, STRANGER, STRANGER)
            with Peer(host.socket.relative_to(host.run_dir)) as peer:  # by a path that needs no directory above
                peer.say(STATUS)
                told = peer.answer()
            os.write(theirs, (told or "hung up").encode())
        except OSError as failure:
            os.write(theirs, (type(failure).__name__ if failure.errno != 32 else "hung up").encode())
        finally:
            os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    with os.fdopen(ours, "rb") as answer:
        return answer.read().decode()


def test_all_that_at_once_and_no_fault_waits(host: Host) -> None:
    """A guest faults on and on, while clients of every kind come and go."""
    vm, random_ = host("a", pages=512).serve(), random.Random(SEED)
    host.pids()
    job = vm.vmm.start("remove_then_verdict", range(512), threads=2, rounds=4, split=True)
    while job.results() is None:
        with ExitStack() as stack:
            for _ in range(20):
                peer = stack.enter_context(Peer(host.socket))
                peer.send(random_.choice([b"vmdp\1\0\3\0", b"vmdp\1\0\1\0a", b"junk"]), [0] * random_.randrange(4))
    assert {verdict for thread in job.wait() for verdict in thread} == {"zero"}
    assert (vm.counters().fault_max_us or 0) < 1e6


def test_a_status_of_many_is_whole(host: Host) -> None:
    vm = host("a")
    fds_ = vm.descriptors
    with host.knock() as peer:
        peer.say(SERVE, b"n" * 64, fds_)
        assert peer.answer() == "served"
        peer.say(STATUS)
        assert f"vm {'n' * 64} {vm.vmm.pid}\n" in str(peer.answer())
