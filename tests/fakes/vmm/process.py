"""The fake VMM's own process: owns guest memory and a userfaultfd, does what its driver says.

Commands come as JSON lines over an inherited socket, one answer each. Whatever touches guest
memory is a job in a thread of its own, in foreign calls that release the interpreter lock: a
thread that waits for a page must not stop the others, nor the commands.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import itertools
import json
import mmap
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from vmd.pages import uffd

PR_SET_PDEATHSIG = 1
PROT_NONE = 0
MAP_FIXED = 0x10
MAP_HUGETLB = 0x40000
HUGE_PAGE = 2 << 20
MREMAP_FIXED = 3  # with MAYMOVE, which it needs
PATTERN = b"written!"

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
libc.write.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
libc.pread.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)


class Memory:
    """Guest memory: regions at addresses of the kernel's choice, gaps between them, one userfaultfd."""

    def __init__(self, image: bytes, spans: list[tuple[int, int]], page_size: int, features: int) -> None:
        self.image = image
        self.page_size = page_size
        self.uffd = uffd.create()
        uffd.enable(self.uffd, features)
        self.regions: list[tuple[int, int, int]] = []  # base, size, offset
        align = max(page_size, HUGE_PAGE)
        total = sum(size + 2 * align for size, _ in spans)
        at = -(-mapped(0, total, PROT_NONE, 0) // align) * align
        for size, offset in spans:
            huge = MAP_HUGETLB if page_size == HUGE_PAGE else 0
            base = mapped(at, size, mmap.PROT_READ | mmap.PROT_WRITE, MAP_FIXED | huge)
            if not huge:  # a huge page behind our back would make more resident than was installed
                libc.madvise(base, size, 15)  # MADV_NOHUGEPAGE
            uffd.register(self.uffd, base, size)
            self.regions.append((base, size, offset))
            at += -(-size // align) * align + align

    def page(self, address: int) -> bytes:
        """The page at ``address``, whole."""
        page = ctypes.create_string_buffer(self.page_size)
        libc.memcpy(page, address, self.page_size)
        return page.raw

    def original(self, address: int) -> bytes:
        """Its bytes of the file."""
        base, _, offset = next(region for region in self.regions if region[0] <= address < region[0] + region[1])
        at = offset + address - base
        return self.image[at : at + self.page_size]

    def verdict(self, address: int) -> str:
        """The page at ``address``: ``zero``, ``image`` (its bytes of the file), or ``other``."""
        page = self.page(address)
        if not any(page):
            return "zero"
        return "image" if page == self.original(address) else "other"

    def content(self, address: int) -> str:
        """As `verdict`, of a page that may have been written to: ``written zero``, ``written image``."""
        page = self.page(address)
        bases = {"zero": bytes(self.page_size), "image": self.original(address)}
        for word, base in bases.items():
            if page == base:
                return word
            if page == PATTERN + base[len(PATTERN) :]:
                return f"written {word}"
        return "other"


def mapped(at: int, size: int, protection: int, flags: int) -> int:
    address = libc.mmap(at, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"mmap {size} bytes: {os.strerror(ctypes.get_errno())}")
    return int(address)


class Worker:
    """What one thread of a job does with an address; a buffer and a file of its own."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.buffer = ctypes.create_string_buffer(PATTERN, len(PATTERN))
        self.file = os.memfd_create("kernel-side")
        os.write(self.file, PATTERN)
        self.random = random.Random(0)
        self.left: dict[int, str] = {}  # what `churn` left on each page

    def close(self) -> None:
        os.close(self.file)

    def read(self, address: int) -> str:
        libc.memcpy(self.buffer, address, len(PATTERN))
        return "ok"

    def write(self, address: int) -> str:
        libc.memcpy(address, ctypes.c_char_p(PATTERN), len(PATTERN))
        return "ok"

    def peek(self, address: int) -> str:
        libc.memcpy(self.buffer, address, len(PATTERN))
        return self.buffer.raw.hex()

    def tail(self, address: int) -> str:
        libc.memcpy(self.buffer, address + self.memory.page_size - len(PATTERN), len(PATTERN))
        return self.buffer.raw.hex()

    def kernel_read(self, address: int) -> str:
        return result(libc.write(self.file, address, len(PATTERN)))

    def kernel_write(self, address: int) -> str:
        return result(libc.pread(self.file, address, len(PATTERN), 0))

    def verdict(self, address: int) -> str:
        return self.memory.verdict(address)

    def content(self, address: int) -> str:
        return self.memory.content(address)

    def churn(self, address: int) -> str:
        """Check, write to or give back a page that no other thread touches: what it holds then."""
        original = "image" if any(self.memory.original(address)) else "zero"
        left = self.left.get(address, original)
        act = self.random.choice([self.content, self.write, self.remove])
        said = act(address)
        if act == self.content and said != left:
            return f"{said} instead of {left}"
        left = {self.write: f"written {left.split()[-1]}", self.remove: "zero"}.get(act, left)
        self.left[address] = left
        return left

    def remove(self, address: int) -> str:
        return result(libc.madvise(address, self.memory.page_size, mmap.MADV_DONTNEED))

    def remove_32_pages(self, address: int) -> str:
        return result(libc.madvise(address, 32 * self.memory.page_size, mmap.MADV_DONTNEED))

    def unmap(self, address: int) -> str:
        return result(libc.munmap(address, self.memory.page_size))

    def move(self, address: int) -> str:
        libc.mremap.restype = ctypes.c_void_p
        target = mapped(0, self.memory.page_size, PROT_NONE, 0)
        size = ctypes.c_size_t(self.memory.page_size)
        moved = libc.mremap(ctypes.c_void_p(address), size, size, MREMAP_FIXED, ctypes.c_void_p(target))
        return "ok" if moved == target else errno.errorcode[ctypes.get_errno()]

    def remove_then_verdict(self, address: int) -> str:
        self.remove(address)
        return self.memory.verdict(address)


def result(returned: int) -> str:
    return "ok" if returned >= 0 else errno.errorcode[ctypes.get_errno()]


class Job:
    """N threads that start together and each do the same thing to all their addresses, in order."""

    def __init__(self, memory: Memory, kind: str, shares: list[list[int]], rounds: int) -> None:
        self.results: list[list[str]] = [[] for _ in shares]
        self._memory, self._kind, self._rounds = memory, kind, rounds
        self._barrier = threading.Barrier(len(shares))
        self._threads = [
            threading.Thread(target=self._run, args=(share, into), daemon=True)
            for share, into in zip(shares, self.results, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, addresses: list[int], into: list[str]) -> None:
        worker = Worker(self._memory)
        act: Callable[[int], str] = getattr(worker, self._kind)
        self._barrier.wait()
        for _ in range(self._rounds):
            for address in addresses:
                into.append(act(address))
        worker.close()

    def done(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)


class Commands:
    """The commands; each method is one, its keywords are the command's keys, what it returns is the answer."""

    def __init__(self) -> None:
        self.memory: Memory | None = None
        self.peer: socket.socket | None = None
        self.jobs: dict[int, Job] = {}
        self.numbers = itertools.count()

    def setup(self, image: str, spans: list[tuple[int, int]], page_size: int, features: int) -> Any:
        with open(image, "rb") as file:  # noqa: PTH123
            self.memory = Memory(file.read(), spans, page_size, features)
        return [region[0] for region in self.memory.regions]

    def connect(self, path: str) -> Any:
        self.peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.peer.connect(path)

    def send(self, data: str, descriptors: list[str]) -> Any:
        assert self.peer is not None
        fds = [self._descriptor(kind) for kind in descriptors]
        body = base64.b64decode(data)
        sent = socket.send_fds(self.peer, [body], fds) if fds else 0
        if body[sent:]:
            self.peer.sendall(body[sent:])
        for fd in fds:
            os.close(fd)

    def _descriptor(self, kind: str) -> int:
        if kind == "uffd":
            assert self.memory is not None
            return os.dup(self.memory.uffd)
        if kind == "eventfd":  # an anonymous inode too, but not the one that is asked for
            return os.eventfd(0)
        return os.open("/dev/null", os.O_RDWR)

    def set_blocking(self, blocking: bool) -> Any:
        assert self.memory is not None
        os.set_blocking(self.memory.uffd, blocking)

    def get_blocking(self) -> Any:
        assert self.memory is not None
        return os.get_blocking(self.memory.uffd)

    def hang_up(self) -> Any:
        assert self.peer is not None
        self.peer.close()

    def start(self, kind: str, shares: list[list[int]], rounds: int) -> Any:
        assert self.memory is not None
        number = next(self.numbers)
        self.jobs[number] = Job(self.memory, kind, shares, rounds)
        return number

    def status(self, job: int) -> Any:
        return self.jobs[job].results if self.jobs[job].done() else None

    def fork(self) -> Any:
        """Fork a child that ends at once; with FEATURE_EVENT_FORK it waits for the event to be read."""
        child = libc.fork()  # not os.fork, which would hold the interpreter's lock all the while
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    def exit(self, code: int) -> Any:
        os._exit(code)


def main() -> None:
    """Serve commands until the driver hangs up; then, or with the driver, die."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    commands = Commands()
    with socket.socket(fileno=int(sys.argv[1])) as control, control.makefile("rwb") as lines:
        for line in lines:
            request = json.loads(line)
            try:
                answer = {"ok": getattr(commands, request.pop("do"))(**request)}
            except OSError as failure:
                answer = {"error": str(failure), "errno": failure.errno}
            lines.write(json.dumps(answer).encode() + b"\n")
            lines.flush()
    os._exit(0)  # not through the interpreter's end, which would wait for threads that wait for pages


if __name__ == "__main__":
    main()
