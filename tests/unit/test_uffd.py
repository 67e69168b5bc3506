"""The userfaultfd ABI: numbers against the header, and results against the kernel that runs."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmd.pages import uffd
from vmd.pages.contract import Outcome
from vmd.pages.uffd import Message, Step

HEADER = Path("/usr/include/linux/userfaultfd.h")
PAGE = mmap.PAGESIZE
PAGES = 8

IOCTLS = {
    "UFFDIO_API": (3, 0x3F, 24),
    "UFFDIO_REGISTER": (3, 0x00, 32),
    "UFFDIO_UNREGISTER": (2, 0x01, 16),
    "UFFDIO_WAKE": (2, 0x02, 16),
    "UFFDIO_COPY": (3, 0x03, 40),
    "UFFDIO_ZEROPAGE": (3, 0x04, 32),
    "UFFDIO_POISON": (3, 0x08, 32),
}


@pytest.mark.parametrize("name", IOCTLS)
def test_ioctl_numbers_are_made_as_the_kernel_makes_them(name: str) -> None:
    direction, number, size = IOCTLS[name]
    assert getattr(uffd, name) == direction << 30 | size << 16 | 0xAA << 8 | number


def test_the_headers_numbers_are_ours() -> None:
    """POISON is newer than the headers of some distributions: what a header lacks is not compared."""
    if not HEADER.exists():
        pytest.skip("linux/userfaultfd.h is not installed")
    text = HEADER.read_text()
    for name, (_, number, _) in IOCTLS.items():
        found = re.search(rf"#define _{name}\s+\(0x([0-9A-F]+)\)", text)
        if found is None:
            assert name == "UFFDIO_POISON"
            continue
        assert int(found[1], 16) == number, name
        macro = re.search(rf"#define {name}\s+_IO(WR|R)\(UFFDIO, _{name},", text)
        assert macro is not None
        assert {"WR": 3, "R": 2}[macro[1]] == getattr(uffd, name) >> 30
    for name in ("PAGEFAULT", "FORK", "REMAP", "REMOVE", "UNMAP"):
        assert int(re.search(rf"#define UFFD_EVENT_{name}\s+(0x\w+)", text)[1], 16) == getattr(uffd, f"EVENT_{name}")  # type: ignore[index]
    for name in ("EVENT_FORK", "EVENT_REMAP", "EVENT_REMOVE", "EVENT_UNMAP"):
        assert 1 << int(re.search(rf"#define UFFD_FEATURE_{name}\s+\(1<<(\d+)\)", text)[1]) == getattr(  # type: ignore[index]
            uffd, f"FEATURE_{name}"
        )
    assert "#define UFFD_API ((__u64)0xAA)" in text
    assert "#define UFFDIO_REGISTER_MODE_MISSING\t((__u64)1<<0)" in text


def test_messages_are_taken_apart() -> None:
    raw = [
        struct.pack("=B7xQQQ", uffd.EVENT_PAGEFAULT, 1, 0x7000_0000_1234, 77),  # flags, address, thread
        struct.pack("=B7xQQQ", uffd.EVENT_REMOVE, 0x1000, 0x3000, 0),
        struct.pack("=B7xIIQQ", uffd.EVENT_FORK, 9, 0xDEAD, 0, 0),
        struct.pack("=B7xQQQ", uffd.EVENT_REMAP, 0x1000, 0x9000, 0x2000),
    ]
    assert {len(each) for each in raw} == {uffd.MESSAGE_BYTES}
    assert list(uffd.messages(b"".join(raw))) == [
        Message(uffd.EVENT_PAGEFAULT, 0x7000_0000_1234, 0),
        Message(uffd.EVENT_REMOVE, 0x1000, 0x3000),
        Message(uffd.EVENT_FORK, 9, 0),
        Message(uffd.EVENT_REMAP, 0x1000, 0x9000),
    ]
    assert list(uffd.messages(b"")) == []


class Area:
    """Some pages of our own that are registered with a userfaultfd of our own."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._anchor = ctypes.c_char.from_buffer(self.memory)
        self.base = ctypes.addressof(self._anchor)
        self.fd = uffd.create()
        self.offered = uffd.enable(self.fd, 0)
        uffd.register(self.fd, self.base, PAGES * PAGE)
        self.bytes = b"".join(bytes([page + 1]) * PAGE for page in range(PAGES))
        self._source = ctypes.create_string_buffer(self.bytes, len(self.bytes))
        self.source = ctypes.addressof(self._source)

    def copy(self, page: int, pages: int = 1) -> Step:
        return uffd.copy(self.fd, self.base + page * PAGE, self.source + page * PAGE, pages * PAGE)

    def page(self, page: int) -> bytes:
        """Only of a page that is there: nobody would serve the fault."""
        return self.memory[page * PAGE : (page + 1) * PAGE]

    def close(self) -> None:
        os.close(self.fd)
        del self._anchor
        self.memory.close()


@pytest.fixture
def area() -> Iterator[Area]:
    area = Area()
    yield area
    area.close()


@pytest.mark.needs_uffd
def test_installs_are_in_when_they_say_so(area: Area) -> None:
    assert area.copy(2, 3) == Step(Outcome.DONE, 3 * PAGE)
    assert uffd.zero(area.fd, area.base, 2 * PAGE) == Step(Outcome.DONE, 2 * PAGE)
    assert [area.page(page) for page in range(5)] == [bytes(PAGE), bytes(PAGE)] + [
        area.bytes[page * PAGE : (page + 1) * PAGE] for page in (2, 3, 4)
    ]
    assert uffd.wake(area.fd, area.base, PAGES * PAGE).outcome is Outcome.DONE


@pytest.mark.needs_uffd
@pytest.mark.seed(10)
def test_present_and_partial(area: Area) -> None:
    area.copy(2)
    assert area.copy(2) == Step(Outcome.PRESENT, 0, errno.EEXIST)
    assert uffd.zero(area.fd, area.base + 2 * PAGE, PAGE).outcome is Outcome.PRESENT
    assert area.page(2) == area.bytes[2 * PAGE : 3 * PAGE]
    step = area.copy(0, 4)  # up to the page that is there
    assert (step.outcome, step.done) == (Outcome.PARTIAL, 2 * PAGE)
    step = uffd.zero(area.fd, area.base + 3 * PAGE, 5 * PAGE)
    assert (step.outcome, step.done) == (Outcome.DONE, 5 * PAGE)


@pytest.mark.needs_uffd
def test_edge_and_fatal(area: Area) -> None:
    assert uffd.copy(area.fd, 0x10000, area.source, PAGE).outcome is Outcome.EDGE  # nothing is mapped there
    assert uffd.copy(area.fd, area.base + 1, area.source, PAGE) == Step(Outcome.FATAL, 0, errno.EINVAL)
    assert uffd.copy(area.fd, area.base, 0x10, PAGE) == Step(Outcome.FATAL, 0, errno.EFAULT)
    assert uffd.copy(-1, area.base, area.source, PAGE) == Step(Outcome.FATAL, 0, errno.EBADF)


@pytest.mark.needs_uffd
def test_poison(area: Area) -> None:
    if not area.offered & uffd.FEATURE_POISON:
        pytest.skip("no UFFDIO_POISON before Linux 6.6")
    assert uffd.poison(area.fd, area.base, PAGE).outcome is Outcome.DONE
    assert uffd.poison(area.fd, area.base, PAGE).outcome is Outcome.PRESENT
    libc = ctypes.CDLL(None, use_errno=True)
    read, write = os.pipe()  # through the kernel: a touch of our own would be SIGBUS
    assert libc.write(write, ctypes.c_void_p(area.base), 8) == -1
    assert ctypes.get_errno() == errno.EFAULT
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("result", "number", "done", "step"),
    [
        (0, 0, 4 * PAGE, Step(Outcome.DONE, 4 * PAGE)),
        (-1, errno.EAGAIN, -errno.EAGAIN, Step(Outcome.LATER, 0, errno.EAGAIN)),  # newer kernels
        (-1, errno.EAGAIN, 0, Step(Outcome.LATER, 0, errno.EAGAIN)),  # 6.1
        (-1, errno.EAGAIN, 2 * PAGE, Step(Outcome.PARTIAL, 2 * PAGE, errno.EAGAIN)),
        (-1, errno.EEXIST, -errno.EEXIST, Step(Outcome.PRESENT, 0, errno.EEXIST)),
        (-1, errno.ENOENT, -errno.ENOENT, Step(Outcome.EDGE, 0, errno.ENOENT)),
        (-1, errno.ESRCH, 0, Step(Outcome.GONE, 0, errno.ESRCH)),
        (-1, errno.ENOMEM, 0, Step(Outcome.FATAL, 0, errno.ENOMEM)),
    ],
)
def test_results_of_every_kernel(result: int, number: int, done: int, step: Step) -> None:
    ctypes.set_errno(number)
    assert uffd._step(result, done, 4 * PAGE) == step
