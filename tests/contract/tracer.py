"""A process that stops single threads of another at chosen system calls, so that a race has one outcome.

``tracer.py PID``: traces the threads that PID's main thread begins from now on (ptrace(2), x86-64;
the main thread itself runs on); with ``all`` behind it also those that there are already. Says
``ready``, then reads one JSON object: the stops. Says each stop by name when a thread has come to
it, and keeps that thread there. Lets all go when its standard input ends.

- ``copy``: a thread is about to install image bytes at address ``copy`` (entry of the ioctl);
- ``pread``: a thread is about to read the file from offset ``pread`` (entry of the system call);
- ``remove``: a thread has just read a REMOVE, and has not yet looked at it (exit of the read).
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import struct
import sys
from pathlib import Path
from typing import Any

PTRACE_CONT = 7
PTRACE_SYSCALL = 24
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_LISTEN = 0x4208
PTRACE_GET_SYSCALL_INFO = 0x420E
OPTION_SYSGOOD = 1 << 0
OPTION_CLONE = 1 << 3
EVENT_CLONE = 3
EVENT_STOP = 128
SYSCALL_STOP = signal.SIGTRAP | 0x80
ENTRY, EXIT = 1, 2
WALL = 0x40000000  # threads too

SYS_READ, SYS_IOCTL, SYS_PREAD64 = 0, 16, 17
UFFDIO_COPY = 0xC028AA03
EVENT_REMOVE = 0x15
MESSAGE_BYTES = 32

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def ptrace(request: int, tid: int, address: int = 0, data: Any = 0) -> None:
    """Make one request. A thread that has ended is none of our business."""
    if libc.ptrace(request, tid, address, data) < 0 and ctypes.get_errno() != errno.ESRCH:
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x}: {os.strerror(ctypes.get_errno())}")


class Tracer:
    """Traces one process until its standard input ends."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        self.reads: dict[int, tuple[int, ...]] = {}  # by thread: the arguments of the read that it is in
        self.stops: dict[str, int] = {}
        ptrace(PTRACE_SEIZE, pid, 0, OPTION_SYSGOOD | OPTION_CLONE)

    def seize_others(self) -> None:
        """Trace the threads that there are, each from its next system call on."""
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            if int(task.name) != self.pid:
                ptrace(PTRACE_SEIZE, int(task.name), 0, OPTION_SYSGOOD | OPTION_CLONE)
                ptrace(PTRACE_INTERRUPT, int(task.name))

    def run(self) -> None:
        """Follow all threads; those at a stop stay there."""
        while not select.select([0], [], [], 0.0005)[0]:
            while True:
                tid, status = os.waitpid(-1, WALL | os.WNOHANG)
                if tid == 0:
                    break
                if os.WIFSTOPPED(status):
                    self.stopped(tid, os.WSTOPSIG(status), status >> 16)

    def stopped(self, tid: int, number: int, event: int) -> None:
        """Let a thread go on, unless it has come to a stop."""
        if number == SYSCALL_STOP and (stop := self.at(tid)):
            del self.stops[stop]
            print(stop, flush=True)
            return
        if event == EVENT_STOP and number in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            ptrace(PTRACE_LISTEN, tid)
            return
        deliver = 0 if number == SYSCALL_STOP or event else number
        ptrace(PTRACE_CONT if tid == self.pid or not self.stops else PTRACE_SYSCALL, tid, 0, deliver)

    def at(self, tid: int) -> str | None:
        """The stop that a thread has come to, from the system call that it is at."""
        info = ctypes.create_string_buffer(88)
        ptrace(PTRACE_GET_SYSCALL_INFO, tid, len(info), ctypes.addressof(info))
        if info.raw[0] == ENTRY:
            number, *arguments = struct.unpack_from("7Q", info.raw, 24)
            if number == SYS_READ:
                self.reads[tid] = tuple(arguments)
            elif number == SYS_IOCTL and arguments[1] == UFFDIO_COPY and "copy" in self.stops:
                start, _, size = struct.unpack("3Q", os.pread(self.memory, 24, arguments[2]))
                return "copy" if start <= self.stops["copy"] < start + size else None
            elif number == SYS_PREAD64 and arguments[3] == self.stops.get("pread"):
                return "pread"
        elif info.raw[0] == EXIT and tid in self.reads and "remove" in self.stops:
            _, buffer, *_ = self.reads.pop(tid)
            (got,) = struct.unpack_from("q", info.raw, 24)
            if got > 0 and got % MESSAGE_BYTES == 0:
                events = os.pread(self.memory, got, buffer)[::MESSAGE_BYTES]
                return "remove" if EVENT_REMOVE in events else None
        return None


def main() -> None:
    """See the module."""
    tracer = Tracer(int(sys.argv[1]))
    if sys.argv[2:] == ["all"]:
        tracer.seize_others()
    print("ready", flush=True)
    tracer.stops = json.loads(sys.stdin.readline())
    tracer.run()
    # Its end lets all threads go.


if __name__ == "__main__":
    main()
