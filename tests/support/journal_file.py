"""The journal's format, version 1, written down a second time: a file taken apart and put together.

It shares nothing with the core, whose `journal.rs` draws it: a change of the format that nobody meant
makes the two disagree. Tests use it to forge journals that are whole but not true.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

MAGIC, VERSION = b"vmdjrnl\0", 1
CHECKED_AT, LIVE_AT, RING_AT, LATENCY_AT, INCIDENT_AT, TAIL_AT = 24, 1024, 2048, 4096, 12288, 16384
SLOTS, BUCKETS, PAGE = 64, 976, 4096
STATES_BYTES_MAX = 1 << 20
"""A journal of more pages than this holds is packed truncated."""
EVENT_PAGEFAULT, EVENT_FORK, EVENT_REMOVE = 0x12, 0x13, 0x15
ABSENT, INSTALLED, REMOVED, POISONED = range(4)
NOTHING, RECORD, REPLAY, SEQUENTIAL = range(4)
INSTALLS = ("demand", "replayed", "prefetched", "zero")
COUNTERS = (*INSTALLS, "removed", "faults", "poisoned", "present", "parked")
INSTALLER = (*INSTALLS, "intent_first", "intent_pages", "intent_before", "intent_counter", "intent_brought")
LIVE = (
    "takeovers", "crashes", "server_pid", "ended", "cpu_ns", "oldest_ns", "replay_pages", "replay_done",
    "faults", "removed", "poisoned", "present", "parked",
    *INSTALLER, *(f"filler{number}_{word}" for number in (1, 2) for word in INSTALLER),
)  # fmt: skip
"""The words of the fault thread as an installer have no prefix: tests forge its alone."""
WORDS = (
    "vmm_pid", "vmm_start", "page_size", "regions", "beside", "offsets", "bytes_max",
    "device", "inode", "image_bytes", "mtime_ns", "path",
    "fault_unserved_ms", "exit_wait_ms", "image_read_tries", "poison_lines_max", "memory_floor_percent",
)  # fmt: skip
FIXED_BYTES = CHECKED_AT + 8 + 16 + 8 * len(WORDS)


@dataclass
class JournalFile:
    """What a journal says. ``states``: one number a page; ``ring``: (event, first, second) a slot."""

    boot_id: bytes = bytes(16)
    vmm_pid: int = 1
    vmm_start: int = 1
    page_size: int = PAGE
    beside: int = NOTHING
    bytes_max: int = 0
    device: int = 0
    inode: int = 0
    image_bytes: int = 0
    mtime_ns: int = 0
    path: bytes = b""
    fault_unserved_ms: int = 10_000
    exit_wait_ms: int = 30_000
    image_read_tries: int = 3
    poison_lines_max: int = 10
    memory_floor_percent: int = 10
    regions: list[tuple[int, int, int]] = field(default_factory=list)  # base, size, offset
    offsets: list[int] = field(default_factory=list)
    live: dict[str, int] = field(default_factory=dict)
    ring: list[tuple[int, int, int]] = field(default_factory=list)
    max_ns: int = 0
    buckets: dict[int, int] = field(default_factory=dict)
    incident: bytes = b""
    states: list[int] = field(default_factory=list)
    version: int = VERSION

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Take a whole file apart; asserts that magic and checksum are right."""
        assert data.startswith(MAGIC)
        words = dict(zip(WORDS, struct.unpack_from(f"<{len(WORDS)}Q", data, FIXED_BYTES - 8 * len(WORDS)), strict=True))
        path_bytes, regions, offsets = (words.pop(name) for name in ("path", "regions", "offsets"))
        at = TAIL_AT + _up(path_bytes, 8)
        tail_end = at + 24 * regions + 8 * offsets
        found = struct.unpack_from(f"<{3 * regions + offsets}Q", data, at)
        assert struct.unpack_from("<Q", data, 16)[0] == checksum(data[CHECKED_AT:FIXED_BYTES], data[TAIL_AT:tail_end])
        max_ns, *buckets = struct.unpack_from(f"<{1 + BUCKETS}Q", data, LATENCY_AT)
        (incident_bytes,) = struct.unpack_from("<Q", data, INCIDENT_AT)
        words["mtime_ns"] -= words["mtime_ns"] >> 63 << 64
        journal = cls(
            **words,
            boot_id=data[CHECKED_AT + 8 : CHECKED_AT + 24],
            path=data[TAIL_AT : TAIL_AT + path_bytes],
            regions=[(found[i], found[i + 1], found[i + 2]) for i in range(0, 3 * regions, 3)],
            offsets=list(found[3 * regions :]),
            live=dict(zip(LIVE, struct.unpack_from(f"<{len(LIVE)}Q", data, LIVE_AT), strict=True)),
            ring=[struct.unpack_from("<B7xQQ8x", data, RING_AT + 32 * slot) for slot in range(SLOTS)],
            max_ns=max_ns,
            buckets={at: count for at, count in enumerate(buckets) if count},
            incident=data[INCIDENT_AT + 8 : INCIDENT_AT + 8 + incident_bytes],
            states=[byte >> shift & 3 for byte in data[_up(tail_end, PAGE) :] for shift in (0, 2, 4, 6)],
            version=struct.unpack_from("<I", data, 8)[0],
        )
        del journal.states[journal.pages() :]
        return journal

    def pack(self, **words: int) -> bytes:
        """Put the file together; its checksum is right. ``words`` are written instead of what they would be."""
        tail = self._tail()
        states_at = _up(TAIL_AT + len(tail), PAGE)
        data = bytearray(states_at + min(_states_bytes(self.pages()), STATES_BYTES_MAX))
        lengths = {"regions": len(self.regions), "offsets": len(self.offsets), "path": len(self.path)}
        values = {**vars(self), **lengths, "file_bytes": len(data), **words}
        checked = struct.pack("<Q16s", values["file_bytes"], self.boot_id)
        checked += struct.pack(f"<{len(WORDS)}Q", *(values[word] & (1 << 64) - 1 for word in WORDS))
        struct.pack_into("<8sIIQ", data, 0, MAGIC, self.version, 0, checksum(checked, tail))
        data[CHECKED_AT:FIXED_BYTES] = checked
        struct.pack_into(f"<{len(LIVE)}Q", data, LIVE_AT, *(self.live.get(name, 0) for name in LIVE))
        for slot, message in enumerate(self.ring):
            struct.pack_into("<B7xQQ8x", data, RING_AT + 32 * slot, *message)
        struct.pack_into("<Q", data, LATENCY_AT, self.max_ns)
        for at, count in self.buckets.items():
            struct.pack_into("<Q", data, LATENCY_AT + 8 + 8 * at, count)
        struct.pack_into(f"<Q{len(self.incident)}s", data, INCIDENT_AT, len(self.incident), self.incident)
        data[TAIL_AT : TAIL_AT + len(tail)] = tail
        for page, state in enumerate(self.states[: self.pages()]):
            data[states_at + page // 4] |= state << page % 4 * 2
        return bytes(data)

    def pages(self) -> int:
        """Pages of all regions."""
        return sum(size // self.page_size for _, size, _ in self.regions) if self.page_size else 0

    def _tail(self) -> bytes:
        numbers = [number for region in self.regions for number in region] + self.offsets
        return self.path.ljust(_up(len(self.path), 8), b"\0") + struct.pack(f"<{len(numbers)}Q", *numbers)


def checksum(*parts: bytes) -> int:
    """FNV-1a, 64 bits, over little-endian words."""
    hash_ = 0xCBF29CE484222325
    for word in _words(parts):
        hash_ = (hash_ ^ word) * 0x100000001B3 & (1 << 64) - 1
    return hash_


def _words(parts: Iterable[bytes]) -> Iterable[int]:
    return (word for part in parts for (word,) in struct.iter_unpack("<Q", part))


def _states_bytes(pages: int) -> int:
    return -(-pages // 32) * 8


def _up(number: int, to: int) -> int:
    return -(-number // to) * to
