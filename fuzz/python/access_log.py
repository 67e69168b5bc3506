"""The reader of `access.log`: one byte that chooses the size of the memory, then the file."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

from vmd import recording
from vmd.errors import VmdError
from vmd.plot import plot_recording
from vmd.recording import PAGE_SIZES, Recording

from . import _line

MEMORY_BYTES = (64 << 20, 4096, 0, 1, 4095, (2 << 20) + 4096, 12345678, 1 << 40, 1 << 63)


def run(data: bytes) -> None:
    """Read it, or refuse it in one line; what was read fits the memory, is all that the file says, and can be drawn."""
    memory_bytes = MEMORY_BYTES[data[0] % len(MEMORY_BYTES)] if data else 0
    try:
        read = _read(data[1:], memory_bytes)
    except VmdError as refused:
        _line.check(str(refused), 400)
        return
    assert read.page_size in PAGE_SIZES
    assert (list(read.offsets), read.skipped) == _expected(data[1:], read.page_size, memory_bytes)
    assert all(ticks >= 0 for ticks in read.faults_per_tick)
    _line.check(recording.refusal(read, snapshot="another", memory="another") or "", 400)
    _check_written(read, memory_bytes)
    _check_other_pages(read, memory_bytes)
    if read.ended or read.faults_per_tick:
        ElementTree.fromstring(plot_recording(read))


def _expected(log: bytes, page_size: int, memory_bytes: int) -> tuple[list[int], int]:
    """What the file says, line by line, and how many lines say nothing that can be used."""
    good: list[int] = []
    bad = 0
    for line in map(bytes.strip, log.split(b"\n")):
        if line and not line.startswith(b"#"):
            offset = int(line) if line.isdigit() and len(line) <= len(str(1 << 64)) else -1
            if 0 <= offset <= memory_bytes - page_size and offset % page_size == 0 and offset not in good:
                good.append(offset)
            else:
                bad += 1
    return good, bad


def _check_written(read: Recording, memory_bytes: int) -> None:
    """The same log, written by us, is read as the same recording."""
    mine = Recording(read.page_size, read.offsets, "a1", "5:6:ff", "settled", faults_per_tick=read.faults_per_tick[:9])
    assert _read(recording._encode(mine), memory_bytes) == mine


def _check_other_pages(read: Recording, memory_bytes: int) -> None:
    for page_size in PAGE_SIZES:
        offsets = recording.offsets_for(read, page_size)
        assert len(set(offsets)) == len(offsets)
        assert all(offset % page_size == 0 and offset < memory_bytes for offset in offsets)


def _read(log: bytes, memory_bytes: int) -> Recording:
    fd = os.memfd_create("access.log")
    try:
        os.write(fd, log)
        return recording.read_access_log(Path(f"/proc/self/fd/{fd}"), memory_bytes)
    finally:
        os.close(fd)
