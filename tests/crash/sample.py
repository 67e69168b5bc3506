"""The stored sample of the journal's format: ``python -m tests.crash.sample`` writes it anew, always the same.

It is small and has something of everything: two regions, a replay half done, a REMOVE that was read and not
applied, an install under way, a page in each state, an incident.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.journal_file import (
    ABSENT,
    EVENT_PAGEFAULT,
    EVENT_REMOVE,
    INSTALLED,
    PAGE,
    POISONED,
    REMOVED,
    REPLAY,
    JournalFile,
)

PATH = Path(__file__).parents[1] / "data" / "journal-1.bin"
LOW, HIGH = 0x7F0000000000, 0x7F0000100000
REGIONS = [(HIGH, 3 * PAGE, 0), (LOW, 5 * PAGE, 3 * PAGE)]
"""Pages 0 to 4 are the image's 3 to 7, pages 5 to 7 its first."""

SAMPLE = JournalFile(
    boot_id=bytes(range(16)),
    vmm_pid=4242,
    vmm_start=123456,
    beside=REPLAY,
    device=0xFE01,
    inode=99,
    image_bytes=8 * PAGE,
    mtime_ns=-1,
    path=b"/images/memory of \xff",
    regions=REGIONS,
    offsets=[5 * PAGE, 0, PAGE],  # pages 2, 5, 6
    live={
        "takeovers": 2, "server_pid": 77, "cpu_ns": 1_500_000, "replay_pages": 3,
        "intent_first": 6, "intent_pages": 2, "intent_before": 1, "intent_counter": 2,
        "demand": 2, "replayed": 1, "removed": 1, "faults": 4, "poisoned": 1, "parked": 1,
    },
    ring=[(EVENT_PAGEFAULT, 0, LOW + 2 * PAGE), (EVENT_REMOVE, HIGH, HIGH + PAGE)],  # pages 2, 5
    max_ns=9000,
    buckets={100: 3, 160: 1},
    incident=b"page at 0x7f0000003000 (memory offset 24576) cannot be read",
    states=[INSTALLED, REMOVED, ABSENT, POISONED, INSTALLED, ABSENT, ABSENT, ABSENT],
)  # fmt: skip

if __name__ == "__main__":
    PATH.write_bytes(SAMPLE.pack())
