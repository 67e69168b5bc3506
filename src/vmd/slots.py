"""How many restores go on at once on this host: VMD_MAX_CONCURRENT_RESTORES, in whichever processes.

A slot is a byte of ``restores.lock`` in the run directory, locked through a descriptor of its own
(F_OFD_SETLK, fcntl(2)): the kernel gives it back when the descriptor is closed, by us or by our death.
Nobody can be told of a byte that came free, so who waits looks again and again. In one process only
the first in the queue does.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from .settings import Settings
from .store import runs

FILE = "restores.lock"

_POLL_SECONDS = 0.01


class _Queue(NamedTuple):
    """Of one loop: at most as many as there are slots are ``inside``, and of these one at a time looks for a byte."""

    inside: asyncio.Semaphore
    looking: asyncio.Lock


_queues: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[Path, int], _Queue]] = WeakKeyDictionary()


@contextlib.asynccontextmanager
async def slot(settings: Settings) -> AsyncIterator[None]:
    """Wait for a slot and hold it. Can be cancelled at any moment. Raises `VmdError`, `OSError`."""
    bound = settings.concurrent_restores_max
    queue = _queue(settings.run_dir, bound)
    async with queue.inside:
        fd = os.open(runs(settings).make() / FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            async with queue.looking:
                while not any(_take(fd, number) for number in range(bound)):
                    await asyncio.sleep(_POLL_SECONDS)
            yield
        finally:
            os.close(fd)


def _queue(run_dir: Path, bound: int) -> _Queue:
    queues = _queues.setdefault(asyncio.get_running_loop(), {})
    return queues.setdefault((run_dir, bound), _Queue(asyncio.Semaphore(bound), asyncio.Lock()))


def _take(fd: int, number: int) -> bool:
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)  # struct flock, of 64 bits
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
    except (BlockingIOError, PermissionError):
        return False
    return True
