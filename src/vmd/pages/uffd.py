"""userfaultfd(2) for the Python side: numbers, messages, and ioctls with signed results.

The numbers are those of linux/userfaultfd.h (POISON: Linux 6.6); a test pins them against the
header of the machine it runs on. Each install says what happened as an `Outcome` and how many
bytes are in, because the kernel tells progress and refusal in two different places:

- return 0: all bytes;
- EAGAIN with a positive result field: that many bytes, then something stopped it;
- EAGAIN with a result of -EAGAIN, or of 0 on 6.1: nothing, a REMOVE is pending.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .contract import Outcome

UFFD_API = 0xAA
IOC_NEW = 0xAA00
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_UNREGISTER = 0x8010AA01
UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04
UFFDIO_POISON = 0xC020AA08

REGISTER_MODE_MISSING = 1 << 0

FEATURE_EVENT_FORK = 1 << 1
FEATURE_EVENT_REMAP = 1 << 2
FEATURE_EVENT_REMOVE = 1 << 3
FEATURE_EVENT_UNMAP = 1 << 6
FEATURE_POISON = 1 << 14

EVENT_PAGEFAULT = 0x12
EVENT_FORK = 0x13
EVENT_REMAP = 0x14
EVENT_REMOVE = 0x15
EVENT_UNMAP = 0x16

MESSAGE_BYTES = 32
# struct uffd_msg: event, three reserved fields, then 24 bytes whose meaning the event decides.
_MESSAGE = struct.Struct("=B7xQQQ")
_SYS_USERFAULTFD = 323  # x86-64
_DEVICE = "/dev/userfaultfd"

_OUTCOMES = {
    errno.EEXIST: Outcome.PRESENT,
    errno.EAGAIN: Outcome.LATER,
    errno.ENOENT: Outcome.EDGE,
    errno.ESRCH: Outcome.GONE,
}

_libc = ctypes.CDLL(None, use_errno=True)


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Register(ctypes.Structure):
    _fields_ = (("range", _Range), ("mode", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


class _Api(ctypes.Structure):
    _fields_ = (("api", ctypes.c_uint64), ("features", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


class _Copy(ctypes.Structure):
    _fields_ = (
        ("dst", ctypes.c_uint64),
        ("src", ctypes.c_uint64),
        ("len", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("done", ctypes.c_int64),
    )


class _Fill(ctypes.Structure):
    """struct uffdio_zeropage and struct uffdio_poison, which look alike."""

    _fields_ = (("range", _Range), ("mode", ctypes.c_uint64), ("done", ctypes.c_int64))


class Step(NamedTuple):
    """What one install did: its outcome, the bytes that are in, the errno behind it (0: none)."""

    outcome: Outcome
    done: int
    errno: int = 0


@dataclass(frozen=True, slots=True)
class Message:
    """One ``struct uffd_msg``: ``start`` and ``end`` are host addresses, bytes.

    PAGEFAULT: ``start`` is the faulting address, ``end`` is 0. FORK: ``start`` is the new
    descriptor, which belongs to the reader. REMAP: from and to.
    """

    event: int
    start: int
    end: int


def messages(data: bytes) -> Iterator[Message]:
    """The messages in what one read(2) of a userfaultfd returned, in the kernel's order."""
    for event, first, second, _ in _MESSAGE.iter_unpack(data):
        if event == EVENT_PAGEFAULT:
            yield Message(event, second, 0)
        elif event == EVENT_FORK:
            yield Message(event, first & 0xFFFFFFFF, 0)
        else:
            yield Message(event, first, second)


def create(flags: int = os.O_CLOEXEC | os.O_NONBLOCK) -> int:
    """A new userfaultfd of this process, from /dev/userfaultfd, else by the system call. Raises OSError."""
    try:
        device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return _checked(_libc.syscall(_SYS_USERFAULTFD, flags), "userfaultfd")
    try:
        return _checked(_libc.ioctl(device, ctypes.c_ulong(IOC_NEW), ctypes.c_int(flags)), "USERFAULTFD_IOC_NEW")
    finally:
        os.close(device)


def enable(uffd: int, features: int) -> int:
    """Agree on API and features (UFFDIO_API), once. Returns the features on offer. Raises OSError."""
    api = _Api(UFFD_API, features, 0)
    _checked(_ioctl(uffd, UFFDIO_API, api), "UFFDIO_API")
    return int(api.features)


def register(uffd: int, start: int, size: int) -> None:
    """Have faults on missing pages of ``[start, start + size)`` reported. Raises OSError."""
    _checked(_ioctl(uffd, UFFDIO_REGISTER, _Register(_Range(start, size), REGISTER_MODE_MISSING, 0)), "UFFDIO_REGISTER")


def copy(uffd: int, start: int, source: int, size: int) -> Step:
    """Install ``size`` bytes from our own address ``source`` and wake the waiters."""
    argument = _Copy(start, source, size, 0, 0)
    return _step(_ioctl(uffd, UFFDIO_COPY, argument), argument.done, size)


def zero(uffd: int, start: int, size: int) -> Step:
    """Install zeros (4 KiB pages only; EINVAL on hugetlb) and wake the waiters."""
    argument = _Fill(_Range(start, size), 0, 0)
    return _step(_ioctl(uffd, UFFDIO_ZEROPAGE, argument), argument.done, size)


def poison(uffd: int, start: int, size: int) -> Step:
    """Have every touch of the range end in SIGBUS, as a memory error would (Linux 6.6)."""
    argument = _Fill(_Range(start, size), 0, 0)
    return _step(_ioctl(uffd, UFFDIO_POISON, argument), argument.done, size)


def wake(uffd: int, start: int, size: int) -> Step:
    """Wake whoever waits in the range; they touch again. Installs nothing."""
    return _step(_ioctl(uffd, UFFDIO_WAKE, _Range(start, size)), 0, size)


def _ioctl(uffd: int, request: int, argument: ctypes.Structure) -> int:
    return int(_libc.ioctl(uffd, ctypes.c_ulong(request), ctypes.byref(argument)))


def _step(result: int, done: int, size: int) -> Step:
    if result >= 0:
        return Step(Outcome.DONE, size)
    number = ctypes.get_errno()
    if done > 0:
        return Step(Outcome.PARTIAL, done, number)
    return Step(_OUTCOMES.get(number, Outcome.FATAL), 0, number)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return int(result)
