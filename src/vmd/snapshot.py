"""Stage 2: freeze a VM into ``vmstate`` and ``memory``, and say what they are.

Both files are immutable once written. The manifest part that describes them is versioned; what
this program cannot load is refused with a word before anything is started. Restores look at sizes
only: whole digests are made here and checked off the restore path (`Snapshot.verify`).
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import functools
import hashlib
import os
import re
import secrets
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from .errors import SnapshotError

SCHEMA = 1

PAGE_SIZES = (4096, 2 << 20)

# Reading unit of the scan; also what makes an all-zero stretch cost one comparison.
_CHUNK_BYTES = 4 << 20
_PAGE_BYTES = 4096

# A shorter run of zeros stays data: each hole costs every later open of the file about 1.5 us to
# find (SEEK_HOLE on ext4) and splits a read in two; reading 64 KiB of zeros costs 6 us.
_HOLE_BYTES_MIN = 64 << 10

_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_FORMAT_WORD = re.compile(rb"^v?(\d+\.\d+\.\d+)$", re.MULTILINE)


class Freezable(Protocol):
    """The part of `vmm.Vmm` that freezing needs."""

    async def pause(self) -> None:
        """Stop the vCPUs."""

    async def snapshot(self, vmstate: Path, memory: Path) -> None:
        """Write a Full snapshot of the paused VM."""

    async def version(self) -> str:
        """Firecracker's version, as its API says it."""
        ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen VM.

    ``directory`` holds ``vmstate`` and ``memory``. ``snapshot_id``: 32 lower-case hex digits, drawn
    when it was frozen. ``page_size``: bytes, 4096 or 2 MiB. ``firecracker``: version that wrote it;
    ``format``: Firecracker's snapshot format, e.g. ``6.0.0``. Digests: SHA-256, lower-case hex.
    """

    directory: Path
    snapshot_id: str
    page_size: int
    firecracker: str
    format: str
    vmstate_bytes: int
    memory_bytes: int
    vmstate_sha256: str
    memory_sha256: str

    @property
    def vmstate(self) -> Path:
        """Firecracker's device and CPU state."""
        return self.directory / "vmstate"

    @property
    def memory(self) -> Path:
        """The guest's memory, region after region; runs of zeros are holes."""
        return self.directory / "memory"

    def save(self) -> dict[str, Any]:
        """The snapshot's part of a manifest; `load` reads it back."""
        return {"schema": SCHEMA, **{key: value for key, value in asdict(self).items() if key != "directory"}}

    def check(self) -> None:
        """Both files are there with their whole length. Reads neither. Raises `SnapshotError`."""
        for path, size in ((self.vmstate, self.vmstate_bytes), (self.memory, self.memory_bytes)):
            found = _size(path)
            if found != size:
                raise SnapshotError(f"torn snapshot: {path} has {found} bytes, expected {size}: do not retry")

    def verify(self) -> None:
        """Read both files whole and compare their digests: never on the restore path. Raises `SnapshotError`."""
        self.check()
        for path, digest in ((self.vmstate, self.vmstate_sha256), (self.memory, self.memory_sha256)):
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise SnapshotError(f"torn snapshot: {path} is not what was frozen: do not retry")

    async def require_format(self, firecracker: Path) -> None:
        """Refuse what ``firecracker`` cannot load. Raises `SnapshotError`."""
        loads = await snapshot_format(firecracker)
        if loads != self.format:
            raise SnapshotError(
                f"snapshot format {self.format}, of Firecracker {self.firecracker}: {firecracker} loads {loads}",
                hint="set VMD_FIRECRACKER to a version that loads it, or build the template anew",
            )


def load(directory: Path, saved: object) -> Snapshot:
    """Read back what `Snapshot.save` made. Raises `SnapshotError` on another schema or a missing key."""
    if not isinstance(saved, dict):
        raise SnapshotError(f"snapshot in {directory}: the manifest does not describe it")
    if saved.get("schema") != SCHEMA:
        raise SnapshotError(
            f"snapshot in {directory}: schema {saved.get('schema')!r}, this vmd reads {SCHEMA}",
            hint="build the template anew with this vmd",
        )
    fields = {key: value for key, value in saved.items() if key in Snapshot.__slots__ and key != "directory"}
    try:
        snapshot = Snapshot(directory=directory, **fields)
    except TypeError:
        missing = [key for key in Snapshot.__slots__ if key != "directory" and key not in saved]
        raise SnapshotError(f"snapshot in {directory}: the manifest lacks {', '.join(missing)}") from None
    if snapshot.page_size not in PAGE_SIZES:
        raise SnapshotError(f"snapshot in {directory}: page size {snapshot.page_size!r} is unknown")
    return snapshot


async def freeze(vmm: Freezable, directory: Path, *, firecracker: Path, page_size: int) -> Snapshot:
    """Pause ``vmm`` and write its snapshot into ``directory``, which exists and is empty of one.

    The VM stays paused. Zero runs of ``memory`` are punched out, both files are durable when this
    returns. Raises `VmmError`, `SnapshotError`, `OSError`.
    """
    await vmm.pause()
    vmstate, memory = directory / "vmstate", directory / "memory"
    await vmm.snapshot(vmstate, memory)
    version = await vmm.version()
    written = await snapshot_format(firecracker)
    memory_sha256, vmstate_sha256 = await asyncio.to_thread(lambda: (compact(memory), _digest(vmstate)))
    return Snapshot(
        directory=directory,
        snapshot_id=secrets.token_hex(16),
        page_size=page_size,
        firecracker=version,
        format=written,
        vmstate_bytes=_size(vmstate),
        memory_bytes=_size(memory),
        vmstate_sha256=vmstate_sha256,
        memory_sha256=memory_sha256,
    )


def compact(memory: Path) -> str:
    """Punch runs of zeros of at least 64 KiB out of ``memory``, fsync it, return its SHA-256.

    One pass over the file, about 0.7 s for 512 MiB. Where the file system has no holes, it stays as
    it is. Raises `OSError`.
    """
    digest = hashlib.sha256()
    fd = os.open(memory, os.O_RDWR | os.O_CLOEXEC)
    try:
        run_start = position = 0
        while chunk := os.pread(fd, _CHUNK_BYTES, position):
            digest.update(chunk)
            for start, end in _data_runs(chunk):
                _punch(fd, run_start, position + start)
                run_start = position + end
            position += len(chunk)
        _punch(fd, run_start, position)
        os.fsync(fd)
    finally:
        os.close(fd)
    return digest.hexdigest()


def _data_runs(chunk: bytes) -> list[tuple[int, int]]:
    """The (start, end) of each page of ``chunk`` that is not all zero, adjacent ones joined."""
    if chunk == _zeros(len(chunk)):
        return []
    runs: list[tuple[int, int]] = []
    zero = _zeros(_PAGE_BYTES)
    for start in range(0, len(chunk), _PAGE_BYTES):
        page = chunk[start : start + _PAGE_BYTES]
        if page == zero:
            continue
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], start + len(page))
        else:
            runs.append((start, start + len(page)))
    return runs


@functools.lru_cache(maxsize=4)
def _zeros(size: int) -> bytes:
    return bytes(size)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _punch(fd: int, start: int, end: int) -> None:
    if end - start < _HOLE_BYTES_MIN:
        return
    if _libc.fallocate(fd, _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, start, end - start) < 0:
        code = ctypes.get_errno()
        if code != errno.EOPNOTSUPP:
            raise OSError(code, os.strerror(code))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as failure:
        raise SnapshotError(f"torn snapshot: {path}: {failure.strerror}: do not retry") from failure


async def snapshot_format(firecracker: Path) -> str:
    """The snapshot format that this binary writes and loads, e.g. ``6.0.0``. Raises `SnapshotError`.

    Asked of the binary once and remembered as long as the file stays the same.
    """
    try:
        status = firecracker.stat()
    except OSError as failure:
        raise SnapshotError(f"{firecracker}: {failure.strerror}") from failure
    key = firecracker, status.st_ino, status.st_size, status.st_mtime_ns
    if key not in _formats:
        _formats[key] = await asyncio.to_thread(_ask_format, firecracker)  # it may take seconds to answer
    return _formats[key]


_formats: dict[tuple[Path, int, int, int], str] = {}


def _ask_format(firecracker: Path) -> str:
    try:
        answer = subprocess.run([firecracker, "--snapshot-version"], capture_output=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as failure:
        raise SnapshotError(f"{firecracker} --snapshot-version: {failure}") from failure
    found = _FORMAT_WORD.search(answer)
    if found is None:
        raise SnapshotError(f"{firecracker} --snapshot-version: no version in {answer[:80]!r}")
    return found[1].decode()
