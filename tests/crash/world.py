"""A fake VMM whose page servers are processes that are killed, and what must hold of it however they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vmd_core

from tests.contract.world import Memory, Served
from tests.fakes.vmm import FakeVmm, eventually
from tests.support.journal_file import JournalFile
from vmd.pages.contract import Counters
from vmd.pages.native import NativeCore

SCRIPT = Path(__file__).with_name("server.py")
REQUEST: dict[str, Any] = {
    "vmm_pid": None, "beside": "nothing", "offsets": [], "prefetch_bytes_max": 0, "death": None, "refused": None,
}  # fmt: skip


class Server:
    """One run of server.py."""

    def __init__(self, **request: object) -> None:
        words = [sys.executable, str(SCRIPT), json.dumps({**REQUEST, **request})]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid

    def hear(self, line: str) -> None:
        """Wait for what it says next."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{line}\n", self.process.wait(5)

    def send(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def stop(self) -> None:
        """Stop all its threads, until SIGCONT."""
        self.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def died(self) -> None:
        """Wait until it has been killed."""
        assert self.process.wait(20) == -signal.SIGKILL

    def kill(self) -> None:
        """SIGKILL, from outside."""
        self.process.kill()
        self.died()

    def close(self) -> None:
        """Nothing stays of it."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class World:
    """``removed``: pages that the VM has given back. ``takeovers``: how many servers have gone on so far."""

    memory: Memory
    vmm: FakeVmm
    run_dir: Path
    stack: ExitStack
    removed: set[int] = field(default_factory=set)
    takeovers: int = 0

    @property
    def journal(self) -> Path:
        """All that is left of a page server."""
        return self.run_dir / "journal"

    def serve(self, **request: object) -> Server:
        """The first page server."""
        socket = self.run_dir / "pages.sock"
        server = self._start(socket=str(socket), memory=str(self.memory.path), **request)
        server.hear("listening")
        self.vmm.handshake(socket)
        return server

    def go_on(self, **request: object) -> Server:
        """Another page server, in another process."""
        server = self._start(vmm_pid=self.vmm.pid, **request)
        server.hear("adopting")
        self.takeovers += 1
        return server

    def adopt(self) -> Served:
        """The last page server, in this process."""
        core = NativeCore.adopt(self.journal, self.vmm.pid)
        assert core is not None
        self.takeovers += 1
        self.stack.callback(core.join)
        self.stack.callback(self.vmm.kill)
        core.start()
        return Served(self.memory, self.vmm, core)

    def left(self) -> dict[str, Any]:
        """What the journal says."""
        with self.journal.open("rb") as file:
            return vmd_core.read_journal(file.fileno())

    def file(self) -> JournalFile:
        """All that stands in it, as it is now."""
        return JournalFile.parse(self.journal.read_bytes())

    def offsets(self, pages: Iterable[int]) -> list[int]:
        """Image offsets of pages, which are numbered by address."""
        return [self.vmm.regions.offset(page) for page in pages]

    def expected(self, page: int) -> str:
        """What the VM must find on a page that it has not written."""
        hole = self.vmm.regions.offset(page) // self.memory.page_size in self.memory.holes
        return "zero" if hole or page in self.removed else "image"

    def is_whole(self, served: Served, absent: Collection[int] = (), removed: int | None = None) -> Counters:
        """At rest nothing waits, the counters add up, ``absent`` are; then every byte is right.

        ``removed``: pages that were installed and given back, so far.
        """
        counters = served.at_rest()
        assert counters.takeovers == self.takeovers
        assert removed is None or counters.removed == removed
        assert not self.vmm.resident() & set(absent)
        pages = range(self.vmm.regions.pages)
        assert self.vmm.verdicts() == [self.expected(page) for page in pages]
        assert served.at_rest().removed == counters.removed
        return counters

    def _start(self, **request: object) -> Server:
        server = Server(journal=str(self.journal), **request)
        self.stack.callback(server.close)
        return server


def waits(vmm: FakeVmm, faults: int, removals: int) -> None:
    """Wait until so many threads of the VMM wait for a page, and so many for their REMOVE to be read."""

    def look() -> bool:
        return (vmm.blocked(), vmm.blocked_in("userfaultfd_event_wait_completion")) == (faults, removals)

    eventually(look, f"{faults} wait for a page, {removals} for a REMOVE to be read")


def is_gone(pid: int) -> bool:
    """Whether no process of this number is left."""
    return not os.path.exists(f"/proc/{pid}")  # noqa: PTH110
