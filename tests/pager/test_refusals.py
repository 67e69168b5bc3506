"""A VM that is handed over wrongly is refused in one clear line; nothing stays open; the right way still works."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.pager.world import PUBLISH, SERVE, Host, Vm, fds
from vmd.errors import PagesFailed
from vmd.pages.journal import Journal


class Case:
    """A VM, and what a wrong SERVE of it is made of: made for one case and closed at its end."""

    def __init__(self, vm: Vm, scratch: Path, undo: ExitStack) -> None:
        self.journal, self.uffd, self.pidfd, self.image = vm.descriptors
        self.vm = vm
        self._scratch = scratch
        self._undo = undo

    def own(self, fd: int) -> int:
        self._undo.callback(os.close, fd)
        return fd

    def file(self, content: bytes, flags: int = os.O_RDWR) -> int:
        self._scratch.write_bytes(content)
        return self.own(os.open(self._scratch, flags))

    def copy(self, flags: int = os.O_RDWR, damaged_at: int | None = None) -> int:
        """The journal in another file, which nobody has locked."""
        content = bytearray(self.vm.journal.path.read_bytes())
        if damaged_at is not None:
            content[damaged_at] ^= 0xFF
        return self.file(bytes(content), flags)

    def waiting(self) -> int:
        journal = Journal.create(self._scratch.with_suffix(".waiting"), self.vm.image, "native")
        journal.remove()
        return self.own(journal.fd)


CASES: dict[str, Callable[[Case], list[int]]] = {
    "expected 4 descriptors, got 0": lambda it: [],
    "expected 4 descriptors, got 3": lambda it: [it.journal, it.uffd, it.pidfd],
    "expected 4 descriptors, got 5": lambda it: [*it.vm.descriptors, it.image],
    "journal: not a journal: no magic": lambda it: [it.file(b"no" * 9999), it.uffd, it.pidfd, it.image],
    "journal: truncated: 0 bytes": lambda it: [it.own(os.eventfd(0)), it.uffd, it.pidfd, it.image],
    "journal: corrupt: its checksum": lambda it: [it.copy(damaged_at=60), it.uffd, it.pidfd, it.image],
    "journal: no VMM has connected": lambda it: [it.waiting(), it.uffd, it.pidfd, it.image],
    "journal: locked: another page server is alive on it": lambda it: [
        it.own(os.open(it.vm.journal.path, os.O_RDWR)), it.uffd, it.pidfd, it.image
    ],
    "Permission denied": lambda it: [it.copy(os.O_RDONLY), it.uffd, it.pidfd, it.image],
    "the second descriptor is not a userfaultfd": lambda it: [
        it.journal, it.own(os.eventfd(0)), it.pidfd, it.image
    ],
    "the third descriptor is not a pidfd of process": lambda it: [it.journal, it.uffd, it.image, it.image],
    "the third descriptor is not a pidfd": lambda it: [
        it.journal, it.uffd, it.own(os.pidfd_open(os.getpid())), it.image
    ],
    "the fourth descriptor is not the image of the journal": lambda it: [
        it.journal, it.uffd, it.pidfd, it.file(it.vm.memory.path.read_bytes())
    ],
}  # fmt: skip


def test_wrong_descriptors(host: Host, tmp_path: Path) -> None:
    vm, told = host("a"), {}
    with host.knock() as peer:
        (pager,) = host.processes()
        before = fds([pager])
        for why, make in CASES.items():
            with ExitStack() as undo:
                peer.say(SERVE, b"a", make(Case(vm, tmp_path / "scratch", undo)))
                told[why] = str(peer.answer()).removeprefix("refused: ")
        eventually(lambda: fds([pager]) == before, "nothing stays open")
    assert {why: text[: len(why)] for why, text in told.items()} == {why: why for why in CASES}
    assert not any("\n" in text for text in told.values())
    assert host.served() == []
    assert vm.serve().is_whole()
    assert host.log() == []


@pytest.mark.parametrize("name", [b"", b"../etc", b"a b", b"a\0", b"\xff", b"n" * 65])
def test_no_name(host: Host, name: bytes) -> None:
    with host.knock() as peer, Path(os.devnull).open() as null:
        for kind in (SERVE, PUBLISH):
            peer.say(kind, name, [null.fileno()])
            assert str(peer.answer()).startswith("refused: expected a name of 1 to 64 letters, digits, . _ -")


def test_what_is_served_already(host: Host) -> None:
    first, second = host("a"), host("b")
    with host.knock() as peer:
        for name, vm, answer in [
            (b"a", first, "served"),
            (b"a", first, "served already"),  # who asked may not have heard the answer
            (b"a", second, "refused: another VM of the name a is served"),
            (b"other", first, "refused: its VMM is served already, under the name a"),
            (b"b", second, "served"),
        ]:
            peer.say(SERVE, name, vm.descriptors)
            assert peer.answer() == answer
    assert host.served() == ["a", "b"]
    assert first.is_whole()
    assert second.is_whole()


def test_the_words_of_a_refusal_reach_the_caller(host: Host) -> None:
    vm = host("a")
    os.utime(vm.memory.path)
    with pytest.raises(PagesFailed, match=r"^pager: the fourth descriptor is not the image of the journal$"):
        vm.serve()
