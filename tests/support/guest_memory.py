"""Guest memory from outside: where a VMM has mapped it, and how much of it is there."""

from __future__ import annotations

from pathlib import Path

_PAGE_BYTES = 4096


def address(pid: int, size: int) -> int:
    """Where the mapping of ``size`` bytes begins in process ``pid``; no other one may have that size."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if end - start == size:
            found.append(start)
    assert len(found) == 1, f"{len(found)} mappings of {size} bytes"
    return found[0]


def resident(pid: int, size: int) -> int:
    """4 KiB pages of it at which there is something, shared zeros too (which smaps does not count)."""
    with Path(f"/proc/{pid}/pagemap").open("rb") as entries:
        entries.seek(address(pid, size) // _PAGE_BYTES * 8)
        return sum(high >> 7 for high in entries.read(size // _PAGE_BYTES * 8)[7::8])
