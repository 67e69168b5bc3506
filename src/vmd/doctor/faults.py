"""Two proofs with a real userfaultfd: a fault is served, and another process's is taken over."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from ..errors import VmdError
from ..host.kernel import pidfd_getfd
from ..pages import uffd
from ..pages.contract import Outcome

_SECONDS = 5.0  # a fault is served within microseconds, and Python starts within half a second
_MARK = 0xA7
_STALL = "from vmd.doctor.faults import stall; stall()"

_libc = ctypes.CDLL(None)


def serve() -> float:
    """Serve one fault of a thread of our own; seconds from the touch to its end.

    Raises `VmdError` or OSError with the step that failed.
    """
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    fd, address = _watch(memory)
    seen: list[int] = []
    toucher = threading.Thread(target=lambda: seen.append(_touch(address)))
    began = time.perf_counter()
    try:
        toucher.start()
        _answer(fd, address)
        toucher.join(_SECONDS)
        took = time.perf_counter() - began
    finally:
        os.close(fd)  # whatever went wrong: without its userfaultfd the fault is resolved and the thread ends
        toucher.join()
    if seen != [_MARK]:
        raise VmdError("the fault was served, and the page did not hold what was put there")
    return took


def features() -> int:
    """The features that userfaultfd has on this kernel, as bits (`uffd.FEATURE_POISON` and others)."""
    fd = uffd.create()
    try:
        return uffd.enable(fd, 0)
    finally:
        os.close(fd)


def take_over() -> None:
    """Take the userfaultfd of a process that nobody serves, and serve it.

    The process is no descendant of ours, as a VMM of `vmd create` is none: Yama's scope 1 lets
    descendants pass. Raises `VmdError` or OSError with the step that failed.
    """
    with subprocess.Popen(
        [sys.executable, "-P", "-c", _STALL], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/"
    ) as parent:
        assert parent.stdout is not None
        out = parent.stdout.fileno()
        pid, address = map(int, _line(out).split())
        pidfd = os.pidfd_open(pid)
        try:
            if _line(out) != "stalled":
                raise VmdError("the process to take over did not fault")
            taken = pidfd_getfd(pidfd, _userfaultfd_of(pid))
            try:
                uffd.wake(taken, address, mmap.PAGESIZE)
                _answer(taken, address)
            finally:
                os.close(taken)
            if _line(out) != str(_MARK):
                raise VmdError("the fault was served, and the page did not hold what was put there")
        finally:
            _end(pidfd)


def stall() -> None:
    """What the process to be taken over does: fault, read the message, never serve it."""
    signal.alarm(60)  # should nobody end it
    if os.fork():
        os._exit(0)
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    fd, address = _watch(memory)
    print(os.getpid(), address, flush=True)
    threading.Thread(target=_ignore_one_fault, args=(fd,), daemon=True).start()
    print(_touch(address), flush=True)


def _ignore_one_fault(fd: int) -> None:
    _wait(fd)
    os.read(fd, uffd.MESSAGE_BYTES)
    print("stalled", flush=True)


def _watch(memory: mmap.mmap) -> tuple[int, int]:
    """Send the faults of ``memory`` to a new userfaultfd: the descriptor and the memory's address."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fd = uffd.create()
    try:
        uffd.enable(fd, 0)
        uffd.register(fd, address, len(memory))
    except BaseException:
        os.close(fd)
        raise
    return fd, address


def _touch(address: int) -> int:
    """Read a byte without the GIL: who waits for the page must not stop who brings it."""
    byte = ctypes.create_string_buffer(1)
    _libc.memcpy(byte, ctypes.c_void_p(address), ctypes.c_size_t(1))
    return byte.raw[0]


def _answer(fd: int, address: int) -> None:
    _wait(fd)
    (message,) = uffd.messages(os.read(fd, uffd.MESSAGE_BYTES))
    if message.event != uffd.EVENT_PAGEFAULT or message.start & -mmap.PAGESIZE != address:
        raise VmdError(f"userfaultfd: expected a fault at {address:#x}, got {message}")
    page = ctypes.create_string_buffer(bytes([_MARK]) * mmap.PAGESIZE, mmap.PAGESIZE)
    step = uffd.copy(fd, address, ctypes.addressof(page), mmap.PAGESIZE)
    if step.outcome is not Outcome.DONE:
        raise VmdError(f"UFFDIO_COPY: {step.outcome}: {os.strerror(step.errno)}")


def _userfaultfd_of(pid: int) -> int:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if str(entry.readlink()) == "anon_inode:[userfaultfd]":
            return int(entry.name)
    raise VmdError(f"no userfaultfd among the descriptors of process {pid}")


def _wait(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if not poll.poll(_SECONDS * 1000):
        raise VmdError(f"nothing came within {_SECONDS:g} s")


def _line(fd: int) -> str:
    text = b""
    while not text.endswith(b"\n"):
        _wait(fd)
        byte = os.read(fd, 1)
        if not byte:
            raise VmdError("the process to take over has ended")
        text += byte
    return text.decode().strip()


def _end(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)
