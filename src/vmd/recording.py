"""Stage 3: which pages a start touches, in first-touch order; the file `access.log`; when to stop recording.

The file (ASCII, written whole or not at all)::

    # vmd access-log 1
    # snapshot: 0f3c...                     a template's only: the id of the snapshot it belongs to
    # memory: SIZE:MTIME_NS:SHA256          identity of the memory file
    # page-size: 4096                       unit of the recording, bytes
    # pages: 6144                           number of offsets below
    # ended: settled                        settled | timeout | exited | stopped
    # faults-per-tick: 0,5120,1024,0,0,0    optional: demand faults in each tick of 100 ms
    1048576                                 byte offsets into the memory file: page-aligned, unique,
    1052672                                 first-touch order, unsigned decimal, LF

A log without header is accepted: its pages are of 4096 bytes and it belongs to any memory.
"""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

from . import limits
from .errors import VmdError

VERSION = 1
PAGE_SIZES = (4096, 2 << 20)

Verdict = Literal["settled", "timeout", "silent"]

_MAGIC = "vmd access-log "
_DIGITS_MAX = 20  # of 2^64 - 1
# A log may hold more lines than its memory has pages: a header, and lines that are to be skipped and counted.
_SPARE_LINES = 1 << 16
# The seed's reader gives a log up at a line of 64 KiB; this many ticks of six digits stay below it.
_TICKS_MAX = 8192


@dataclass(frozen=True, slots=True)
class Recording:
    """The pages that a start touched.

    ``offsets``: byte offsets into the memory file, multiples of ``page_size`` (bytes), unique, in
    first-touch order. ``snapshot`` and ``memory`` name what was recorded, ``ended`` says why the
    recording ended; None where the log does not say. ``skipped``: bad lines of the log.
    ``faults_per_tick``: demand faults in each `limits.SETTLE_TICK_SECONDS`, empty when not known.
    """

    page_size: int
    offsets: array[int]
    snapshot: str | None = None
    memory: str | None = None
    ended: str | None = None
    skipped: int = 0
    faults_per_tick: tuple[int, ...] = ()


# --- the file --------------------------------------------------------------------------------


def write_access_log(path: Path, recording: Recording) -> None:
    """Write ``recording`` to ``path``: a temporary file beside it, fsync, rename, fsync of the directory.

    An old file stays until the new one is complete, and stays for good when this fails (`VmdError`).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            _write_synced(temporary, _encode(recording))
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    except OSError as failure:
        raise VmdError(f"write {path}: {failure.strerror}") from failure


def read_access_log(path: Path, memory_bytes: int) -> Recording:
    """Read the log at ``path`` for a memory file of ``memory_bytes`` bytes.

    Lines that are no number, misaligned to the log's own page size, outside the memory or
    repeated are skipped and counted. Raises `VmdError` when the file is missing, cannot be read, is
    not a regular file, is larger than any log of that memory, or has a header that this version does not know.
    """
    data = _read_bounded(path, _lines_max(memory_bytes))
    header, body = _split_header(data)
    try:
        keys = _header_keys(header)
        page_size = int(keys.get("page-size", "4096"))
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page-size: expected 4096 or {PAGE_SIZES[1]}, got {page_size}")
        ticks = tuple(_faults(word) for word in keys.get("faults-per-tick", "").split(",") if word)
    except ValueError as failure:
        raise VmdError(f"read {path}: {failure}") from None
    offsets, skipped = _parse(body, page_size, memory_bytes)
    return Recording(
        page_size,
        offsets,
        snapshot=keys.get("snapshot"),
        memory=keys.get("memory"),
        ended=keys.get("ended"),
        skipped=skipped,
        faults_per_tick=ticks,
    )


def _encode(recording: Recording) -> bytes:
    keys = {
        "snapshot": recording.snapshot,
        "memory": recording.memory,
        "page-size": recording.page_size,
        "pages": len(recording.offsets),
        "ended": recording.ended,
        "faults-per-tick": ",".join(map(str, recording.faults_per_tick[:_TICKS_MAX])) or None,
    }
    header = [f"# {_MAGIC}{VERSION}"] + [f"# {key}: {value}" for key, value in keys.items() if value is not None]
    return ("\n".join(chain(header, map(str, recording.offsets))) + "\n").encode("ascii")


def _write_synced(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # left by a killed process that had our pid
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _lines_max(memory_bytes: int) -> int:
    return min(memory_bytes // PAGE_SIZES[0] + _SPARE_LINES, limits.ACCESS_LOG_LINES_MAX)


def _read_bounded(path: Path, lines_max: int) -> bytes:
    bytes_max = lines_max * (_DIGITS_MAX + 1)
    try:
        # Non-blocking: a FIFO is to be refused, not waited for.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as failure:
        raise VmdError(f"read {path}: {failure.strerror}") from failure
    except ValueError as failure:  # a NUL in the path
        raise VmdError(f"read {path}: {failure}") from failure
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise VmdError(f"read {path}: not a regular file")
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(bytes_max + 1)
    except OSError as failure:
        raise VmdError(f"read {path}: {failure.strerror}") from failure
    finally:
        os.close(fd)
    if len(data) > bytes_max:
        raise VmdError(f"read {path}: more than {bytes_max} bytes is no access log of this memory")
    if data.count(b"\n") > lines_max:
        raise VmdError(f"read {path}: more than {lines_max} lines is no access log of this memory")
    return data


def _split_header(data: bytes) -> tuple[list[bytes], bytes]:
    header, at = [], 0
    while data.startswith((b"#", b"\n"), at):
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        header.append(data[at:end])
        at = end + 1
    return header, data[at:]


def _header_keys(lines: list[bytes]) -> dict[str, str]:
    keys: dict[str, str] = {}
    for line in lines:
        text = line.decode("ascii", "replace").lstrip("#").strip()
        if text.startswith(_MAGIC):
            version = text.removeprefix(_MAGIC)
            if version != str(VERSION):
                raise ValueError(f"access-log version {version[:20]!r}; this vmd reads {VERSION}")
        key, colon, value = text.partition(":")
        if colon:
            keys.setdefault(key.strip(), _printable(value.strip()))
    return keys


def _faults(word: str) -> int:
    faults = int(word)
    if not 0 <= faults < 1 << 64:
        raise ValueError(f"faults-per-tick: expected numbers of faults, got {word[:_DIGITS_MAX]}")
    return faults


def _printable(value: str) -> str:
    """``value`` as it may be shown: it goes into warnings and onto terminals, and anybody can write a log."""
    return value if value.isprintable() else ascii(value)[1:-1]


def _parse(body: bytes, page_size: int, memory_bytes: int) -> tuple[array[int], int]:
    clean = _parse_clean(body, page_size, memory_bytes)
    return (clean, 0) if clean is not None else _parse_line_by_line(body, page_size, memory_bytes)


def _parse_clean(body: bytes, page_size: int, memory_bytes: int) -> array[int] | None:
    """All lines at once, None unless every one is good: a restore waits for this (0.1 µs a line)."""
    if not body:
        return array("Q")
    if body.translate(None, b"0123456789\n"):
        return None
    try:
        # The fastest way in the standard library from digits to integers: a third less than int().
        values: list[int] = json.loads(b"[%b]" % body.removesuffix(b"\n").replace(b"\n", b","))
    except ValueError:  # a blank line, leading zeros, thousands of digits
        return None
    if max(values) > memory_bytes - page_size or len(set(values)) != len(values):
        return None
    offsets = array("Q", values)
    return offsets if _all_aligned(offsets, page_size) else None


def _all_aligned(offsets: array[int], page_size: int) -> bool:
    """Their bits below the page size, all in one operation on one long integer."""
    mask = array("Q", [page_size - 1]).tobytes() * len(offsets)
    return not int.from_bytes(offsets.tobytes(), sys.byteorder) & int.from_bytes(mask, sys.byteorder)


def _parse_line_by_line(body: bytes, page_size: int, memory_bytes: int) -> tuple[array[int], int]:
    good: dict[int, None] = {}
    skipped = 0
    for raw in body.split(b"\n"):
        line = raw.strip()
        if not line or line.startswith(b"#"):
            continue
        offset = int(line) if line.isdigit() and len(line) <= _DIGITS_MAX else -1
        if 0 <= offset <= memory_bytes - page_size and offset % page_size == 0 and offset not in good:
            good[offset] = None
        else:
            skipped += 1
    return array("Q", good), skipped


# --- use -------------------------------------------------------------------------------------


def offsets_for(recording: Recording, page_size: int) -> array[int]:
    """The recorded offsets in pages of ``page_size`` bytes, unique, first-touch order.

    A log of smaller pages names the pages that hold them; a log of larger pages names all the
    pages inside each of them, upwards.
    """
    if page_size == recording.page_size:
        return recording.offsets
    if page_size > recording.page_size:
        return array("Q", dict.fromkeys(map((-page_size).__and__, recording.offsets)))
    pieces: Iterator[range] = (range(offset, offset + recording.page_size, page_size) for offset in recording.offsets)
    return array("Q", chain.from_iterable(pieces))


def refusal(recording: Recording, *, snapshot: str | None = None, memory: str | None = None) -> str | None:
    """Why this recording must not be used for ``snapshot`` or ``memory``; None when it may.

    Only what both sides name is compared.
    """
    for what, mine, theirs in (("snapshot", recording.snapshot, snapshot), ("memory", recording.memory, memory)):
        if mine is not None and theirs is not None and mine != theirs:
            return f"recorded on {what} {mine[:100]}, this is {theirs[:100]}"
    return None


# --- when to stop ----------------------------------------------------------------------------


def settled(counts: Sequence[int], seconds_max: float) -> Verdict | None:
    """Whether a recording is over, from the number of faults so far at each tick; None to go on.

    ``counts[k]`` is the total at ``(k + 1) * limits.SETTLE_TICK_SECONDS`` after the start, never
    falling. *settled*: there was activity, and then `limits.SETTLE_QUIET_TICKS` ticks in a row without any,
    each of them at `limits.SETTLE_LEAST_SECONDS` or later. At ``seconds_max`` it ends in any case:
    *timeout*, or *silent* when there was no fault at all. A verdict once given stays: more ticks do
    not change it.
    """
    end = _end(counts, seconds_max)
    return None if end is None else end[1]


def settled_at(counts: Sequence[int], seconds_max: float = math.inf) -> int | None:
    """The index in ``counts`` of the tick with which the recording `settled`; None if it did not."""
    end = _end(counts, seconds_max)
    return end[0] if end is not None and end[1] == "settled" else None


def _end(counts: Sequence[int], seconds_max: float) -> tuple[int, Verdict] | None:
    least = _ticks(limits.SETTLE_LEAST_SECONDS)
    most = _ticks(seconds_max)
    active, quiet = False, 0
    for tick, (before, now) in enumerate(pairwise(chain((0,), counts)), start=1):
        if now > before:
            active, quiet = True, 0
        elif active and tick >= least:
            quiet += 1
        if quiet == limits.SETTLE_QUIET_TICKS:
            return tick - 1, "settled"
        if tick >= most:
            return tick - 1, "timeout" if active else "silent"
    return None


def _ticks(seconds: float) -> float:
    """Ticks that cover ``seconds``; rounded first, since 0.5 / 0.1 need not be 5."""
    ticks = round(seconds / limits.SETTLE_TICK_SECONDS, 6) if math.isfinite(seconds) else math.inf
    return math.ceil(ticks) if math.isfinite(ticks) else ticks
