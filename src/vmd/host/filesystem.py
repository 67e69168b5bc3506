"""What the file systems of this host can do."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path

_PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE with FALLOC_FL_KEEP_SIZE, <linux/falloc.h>
_PIECE_BYTES = 1 << 20  # larger than the block of any file system that we know

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def nearest(path: Path) -> Path:
    """``path``, or its first parent that exists: where it would be made."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def kind(path: Path) -> str:
    """The type of the file system that holds ``path``, for example ``tmpfs``; ``unknown`` when not told."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return "unknown"


def keeps_holes(directory: Path) -> bool:
    """Whether zeros can be punched out of a file in ``directory``, and are then told by SEEK_HOLE.

    Raises OSError when no file can be written there. Leaves none.
    """
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(b"x" * (3 * _PIECE_BYTES))
        file.flush()
        os.fsync(file.fileno())
        if _libc.fallocate(file.fileno(), _PUNCH_HOLE, _PIECE_BYTES, _PIECE_BYTES) != 0:
            return False
        hole = os.lseek(file.fileno(), 0, os.SEEK_HOLE)
        return hole == _PIECE_BYTES and os.lseek(file.fileno(), hole, os.SEEK_DATA) == 2 * _PIECE_BYTES
