"""The image: where page contents come from.

Read with pread only, never through a mapping: a bad sector under a mapping is a SIGBUS that
takes the process with it (peers.md, trap 15). Holes of the file are known zeros and never read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from bisect import bisect_right
from pathlib import Path

from ..errors import VmdError

_IDENTITY_PAGE = 4096
_IDENTITY_PAGES = 64


class Image:
    """An open memory file. Owns its descriptor; `detach` hands it on, `close` ends it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open and check. Raises `VmdError` when it is not a regular, non-empty, readable file."""
        self.path = Path(path)
        self.fd = _open(self.path)
        status = os.fstat(self.fd)
        try:
            if not stat.S_ISREG(status.st_mode):
                raise VmdError(f"memory {self.path}: expected a regular file, got {_kind(status.st_mode)}")
            if status.st_size == 0:
                raise VmdError(f"memory {self.path}: the file is empty")
        except VmdError:
            self.close()
            raise
        self.size = status.st_size
        self.mtime_ns = status.st_mtime_ns

    def identity(self) -> str:
        """``SIZE:MTIME_NS:SHA256`` over 64 sampled pages (interfaces.md, "Identity").

        Reads 256 KiB whatever the size of the file. Raises `VmdError` when it cannot be read.
        """
        pages = self.size // _IDENTITY_PAGE
        digest = hashlib.sha256()
        for page in _sampled(pages):
            digest.update(_read_exactly(self.fd, page * _IDENTITY_PAGE, _IDENTITY_PAGE, self.path))
        return f"{self.size}:{self.mtime_ns}:{digest.hexdigest()}"

    def data_extents(self) -> list[tuple[int, int]]:
        """The (start, end) byte ranges that hold data; what is between them is a hole.

        lseek(2) SEEK_DATA/SEEK_HOLE; a file system without holes reports one extent. What a file
        has lost since it was opened counts as data: it must be found unreadable, not zero.
        """
        extents = []
        position = 0
        size = min(self.size, os.fstat(self.fd).st_size)
        while position < size:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError as failure:
                if failure.errno == errno.ENXIO:  # only a hole is left
                    break
                raise
            position = os.lseek(self.fd, start, os.SEEK_HOLE)
            extents.append((start, position))
        if size < self.size:
            extents.append((size, self.size))
        return extents

    def detach(self) -> int:
        """Give the descriptor away; the image forgets it."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        if self.fd >= 0:
            os.close(self.detach())


class Extents:
    """The data extents of an image, to look up whether a range holds only zeros."""

    def __init__(self, extents: list[tuple[int, int]]) -> None:
        self._extents = extents
        self._starts = [start for start, _ in extents]

    def is_hole(self, offset: int, size: int) -> bool:
        """Whether no byte of ``[offset, offset + size)`` is in a data extent."""
        at = bisect_right(self._starts, offset) - 1
        if at >= 0 and offset < self._extents[at][1]:
            return False
        return at + 1 >= len(self._starts) or self._starts[at + 1] >= offset + size


def _open(path: Path) -> int:
    try:
        # O_NONBLOCK: opening a FIFO by mistake must not wait for a writer.
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as failure:
        raise VmdError(f"memory {path}: {failure.strerror}") from failure


def _kind(mode: int) -> str:
    for test, word in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISFIFO, "a FIFO"),
    ):
        if test(mode):
            return word
    return "something else"


def _sampled(pages: int) -> list[int]:
    if pages <= _IDENTITY_PAGES:
        return list(range(pages))
    return [i * pages // _IDENTITY_PAGES for i in range(_IDENTITY_PAGES)]


def _read_exactly(fd: int, offset: int, size: int, path: Path) -> bytes:
    try:
        data = os.pread(fd, size, offset)
    except OSError as failure:
        raise VmdError(f"memory {path}: read at {offset}: {failure.strerror}") from failure
    if len(data) != size:
        raise VmdError(f"memory {path}: truncated at {offset + len(data)}")
    return data
