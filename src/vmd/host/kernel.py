"""What this kernel offers: asked of the kernel itself, never read from its version."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

CAP_SYS_PTRACE = 19  # <linux/capability.h>

_SYS_PIDFD_GETFD = 438  # the same number on every architecture
_SO_PEERPIDFD = 77  # Linux 6.5
_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), Linux 6.7
_PM_SCAN_ARG = struct.Struct("=12Q")
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")

_libc = ctypes.CDLL(None, use_errno=True)


class HugePages(NamedTuple):
    """The host's pool of 2 MiB pages, in pages."""

    total: int
    free: int


def release() -> tuple[int, int]:
    """The kernel's version, for example ``(6, 1)``."""
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(letter for letter in minor if letter.isdigit()) or 0)


def huge_pages() -> HugePages | None:
    """The pool of 2 MiB pages; None when the kernel has no such pages."""
    try:
        total, free = (int((_HUGE_PAGES / name).read_text()) for name in ("nr_hugepages", "free_hugepages"))
    except (OSError, ValueError):
        return None
    return HugePages(total, free)


def has_capability(number: int) -> bool:
    """Whether this process has a capability in its effective set."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def has_peerpidfd() -> bool:
    """SO_PEERPIDFD: a socket names its peer's process by a pidfd (Linux 6.5)."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            os.close(ours.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD))
        except OSError as failure:
            return failure.errno != errno.ENOPROTOOPT
    return True


def has_pagemap_scan() -> bool:
    """PAGEMAP_SCAN: which pages are dirty, from outside of a process (Linux 6.7)."""
    argument = _PM_SCAN_ARG.pack(_PM_SCAN_ARG.size, *(0,) * 11)  # of an empty range
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        return bool(_libc.ioctl(pagemap.fileno(), ctypes.c_ulong(_PAGEMAP_SCAN), argument) == 0)


def pidfd_getfd(pidfd: int, number: int) -> int:
    """A copy, close-on-exec, of descriptor ``number`` of another process (pidfd_getfd(2)). Raises OSError."""
    fd: int = _libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
    if fd < 0:
        raise OSError(ctypes.get_errno(), f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
    return fd
