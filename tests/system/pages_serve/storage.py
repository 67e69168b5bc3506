"""A file whose storage stops answering: each read of it waits for a permission that nobody gives."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from pathlib import Path
from typing import Self

_FAN_CLASS_CONTENT, _FAN_CLOEXEC = 0x4, 0x1
_FAN_MARK_ADD, _FAN_ACCESS_PERM = 0x1, 0x20000
_FAN_ALLOW, _FAN_DENY = 1, 2
_AT_FDCWD = -100
_EVENT = struct.Struct("IBBHQii")  # struct fanotify_event_metadata
_RESPONSE = struct.Struct("iI")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fanotify_mark.argtypes = (ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p)


class SilentStorage:
    """By fanotify(7). Make it before the reader opens the file: a kernel asks only readers that came after."""

    def __init__(self, path: Path) -> None:
        self._fd = _libc.fanotify_init(_FAN_CLASS_CONTENT | _FAN_CLOEXEC, os.O_RDONLY | os.O_CLOEXEC)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        marked = _libc.fanotify_mark(self._fd, _FAN_MARK_ADD, _FAN_ACCESS_PERM, _AT_FDCWD, os.fsencode(path))
        assert marked == 0, os.strerror(ctypes.get_errno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        """Until somebody reads."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        assert poll.poll(10_000), "nobody reads"

    def answer(self, *, allow: bool = True) -> None:
        """Let one read go on, or fail."""
        self.wait()
        event = _EVENT.unpack(os.read(self._fd, _EVENT.size))
        os.write(self._fd, _RESPONSE.pack(event[5], _FAN_ALLOW if allow else _FAN_DENY))
        os.close(event[5])

    def close(self) -> None:
        """All reads go on. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
