"""The processes that scenarios run in: a nursery, and the VMMs that it forks.

A VMM is ready within a millisecond so, and serves one scenario after the other, each over fresh memory and a fresh
userfaultfd, until it exits or is killed. Commands and answers are packets of JSON; see `Vmm`.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import queue
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from tests.fakes.vmm.process import PATTERN, PR_SET_PDEATHSIG, libc, mapped, result
from tests.scenario.language import PAGES
from vmd.pages import uffd
from vmd.pages.regions import SYSTEM_PAGE

WORD = len(PATTERN)
PACKET_BYTES = 1 << 16


class Memory:
    """One scenario's guest memory."""

    def __init__(self, image: bytes) -> None:
        self.image = [image[at : at + SYSTEM_PAGE] for at in range(0, PAGES * SYSTEM_PAGE, SYSTEM_PAGE)]
        self.uffd = uffd.create()
        uffd.enable(self.uffd, uffd.FEATURE_EVENT_REMOVE | uffd.FEATURE_EVENT_UNMAP)
        self.base = mapped(0, PAGES * SYSTEM_PAGE, mmap.PROT_READ | mmap.PROT_WRITE, 0)
        self.mapped = set(range(PAGES))
        uffd.register(self.uffd, self.base, PAGES * SYSTEM_PAGE)

    def close(self) -> None:
        """Give all back: only what is still ours, others may have mapped what was unmapped."""
        os.close(self.uffd)
        for page in self.mapped:
            libc.munmap(self.base + page * SYSTEM_PAGE, SYSTEM_PAGE)

    def do(self, kind: str, start: int, stop: int) -> str:
        """One deed of the language: the result as `guest.Results` has it."""
        at, size = self.base + start * SYSTEM_PAGE, (stop - start) * SYSTEM_PAGE
        match kind:
            case "remove":
                return result(libc.madvise(at, size, mmap.MADV_DONTNEED))
            case "unmap":
                self.mapped -= set(range(start, stop))
                return result(libc.munmap(at, size))
            case "write":
                libc.memcpy(at, PATTERN, WORD)
                return "ok"
            case "pread" | "pwrite":
                return self._by_the_kernel(kind, start, at)
            case _:
                return self._seen(start, copied(at, WORD))

    def _by_the_kernel(self, kind: str, page: int, at: int) -> str:
        file = os.memfd_create("kernel-side")
        try:
            if kind == "pread":
                os.pwrite(file, PATTERN, 0)
                return result(libc.pread(file, at, WORD, 0))
            done = result(libc.write(file, at, WORD))
            return self._seen(page, os.pread(file, WORD, 0)) if done == "ok" else done
        finally:
            os.close(file)

    def _seen(self, page: int, word: bytes) -> str:
        return "mine" if word == PATTERN else self._named(page, word, 0)

    def _named(self, page: int, data: bytes, at: int) -> str:
        if not any(data):
            return "zero"
        return "image" if data == self.image[page][at : at + len(data)] else "other"

    def content(self, page: int) -> str:
        """A page, whole."""
        if page not in self.mapped:
            return "-"
        data = copied(self.base + page * SYSTEM_PAGE, SYSTEM_PAGE)
        rest = self._named(page, data[WORD:], WORD)
        if data[:WORD] == PATTERN:
            return rest + "*"
        return rest if self._named(page, data[:WORD], 0) == rest else "other"


def copied(address: int, size: int) -> bytes:
    """Bytes of guest memory; waits for them without the interpreter's lock."""
    data = bytearray(size)
    libc.memcpy((ctypes.c_char * size).from_buffer(data), address, size)
    return bytes(data)


class Worker:
    """A thread of the guest: does what it is given in order."""

    def __init__(self, done: queue.SimpleQueue[tuple[int, str]]) -> None:
        self.given: queue.SimpleQueue[tuple[Memory, int, str, int, int]] = queue.SimpleQueue()
        self._done = done
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            memory, at, kind, start, stop = self.given.get()
            self._done.put((at, memory.do(kind, start, stop)))


class Vmm:
    """The commands; the first word of a packet is one, what it returns is the answer."""

    def __init__(self, image: Path) -> None:
        self._image = image.read_bytes()
        self._memory: Memory | None = None
        self._done: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._workers: dict[int, Worker] = {}
        self._running = 0
        self._results: dict[int, Any] = {}

    def fresh(self) -> tuple[int, list[int]]:
        """Make fresh memory: its address; the userfaultfd comes with the answer."""
        if self._memory is not None:
            self._memory.close()
        self._memory = Memory(self._image)
        self._results = {}
        return self._memory.base, [self._memory.uffd]

    def play(self, lines: list[tuple[int, int, str, int, int]]) -> tuple[dict[int, Any], list[int]]:
        """Do these lines, (place in the scenario, thread, what, first page, page after): all results so far."""
        assert self._memory is not None
        for at, thread, what, start, stop in lines:
            if thread:
                self._worker(thread).given.put((self._memory, at, what, start, stop))
                self._running += 1
            elif what in ("join", "check all"):
                self._join()
                if what == "check all":
                    self._results[at] = [self._memory.content(page) for page in range(PAGES)]
            else:
                self._results[at] = self._memory.do(what, start, stop)
        return self._results, []

    def _worker(self, number: int) -> Worker:
        if number not in self._workers:
            self._workers[number] = Worker(self._done)
        return self._workers[number]

    def _join(self) -> None:
        while self._running:
            at, seen = self._done.get()
            self._results[at] = seen
            self._running -= 1

    def exit(self) -> tuple[None, list[int]]:
        """End at once."""
        os._exit(0)


def serve(control: socket.socket, image: Path) -> None:
    """Be a VMM until the driver hangs up."""
    vmm = Vmm(image)
    while data := control.recv(PACKET_BYTES):
        command, *keys = json.loads(data)
        answer, fds = getattr(vmm, command)(*keys)
        socket.send_fds(control, [json.dumps(answer).encode()], fds)
    os._exit(0)


def nurse(control: socket.socket, image: Path) -> None:
    """Fork a VMM for each socket that comes, until the driver hangs up: its pid."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps them
    while True:
        data, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        with socket.socket(fileno=fds[0]) as theirs:
            if (pid := os.fork()) == 0:
                libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
                control.close()
                serve(theirs, image)
            control.send(str(pid).encode())


if __name__ == "__main__":
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    nurse(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
