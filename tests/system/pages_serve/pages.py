"""Page caches, page tables and memory files, looked at without any code of the product."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
PRESENT = 1 << 63  # of a pagemap entry

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def identity(memory: Path) -> str:
    """The identity of a bare memory file, as interfaces.md says it: SIZE:MTIME_NS:SHA256."""
    status = memory.stat()
    pages = status.st_size // 4096
    numbers = [i * pages // 64 for i in range(64)] if pages > 64 else range(pages)
    with memory.open("rb") as file:
        content = b"".join(os.pread(file.fileno(), 4096, number * 4096) for number in numbers)
    return f"{status.st_size}:{status.st_mtime_ns}:{hashlib.sha256(content).hexdigest()}"


def write_log(path: Path, offsets: Iterable[int], header: Sequence[str] = ()) -> Path:
    """An access.log with these header lines."""
    path.write_text("".join(f"{line}\n" for line in (*header, *offsets)))
    return path


def log_of(memory: Path, page_size: int = PAGE, /, **changed: str) -> list[str]:
    """Header lines of a log that was recorded on ``memory``."""
    keys = {"memory": identity(memory), "page-size": str(page_size), "ended": "exited", **changed}
    return ["# vmd access-log 1", *(f"# {key}: {value}" for key, value in keys.items())]


def read_log(path: Path) -> tuple[dict[str, str], list[int]]:
    """The keys and the offsets of an access.log; every line must be one of the two."""
    text = path.read_text("ascii")
    assert text.startswith("# vmd access-log 1\n")
    assert text.endswith("\n")
    lines = text.splitlines()[1:]
    keys = dict(line.removeprefix("# ").split(": ", 1) for line in lines if line.startswith("#"))
    return keys, [int(line) for line in lines if not line.startswith("#")]


def evict(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_pages(path: Path) -> int:
    """How many pages of a file are in the page cache, by mincore(2)."""
    size = path.stat().st_size
    vector = ctypes.create_string_buffer(-(-size // PAGE))
    with path.open("rb") as file:
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    assert address != ctypes.c_void_p(-1).value
    assert _libc.mincore(address, size, vector) == 0
    _libc.munmap(address, size)
    return sum(byte & 1 for byte in vector.raw)


def served_ranges(pid: int) -> list[tuple[int, int]]:
    """The address ranges of a process that are registered with a userfaultfd, by the flag ``um`` of smaps."""
    ranges = []
    bounds = (0, 0)
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if words[0] == "VmFlags:" and "um" in words:
            ranges.append(bounds)
        elif "-" in words[0] and not words[0].endswith(":"):
            low, _, high = words[0].partition("-")
            bounds = int(low, 16), int(high, 16)
    return ranges


def resident_pages(pid: int, page_size: int = PAGE) -> set[int]:
    """Addresses of the pages in those ranges that are in memory, by pagemap."""
    found = set()
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        for low, high in served_ranges(pid):
            entries = os.pread(pagemap.fileno(), (high - low) // PAGE * 8, low // PAGE * 8)
            for number, (entry,) in enumerate(struct.iter_unpack("Q", entries)):
                if entry & PRESENT:
                    found.add((low + number * PAGE) // page_size * page_size)
    return found
