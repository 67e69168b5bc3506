"""Waiting for one descriptor in an asyncio loop, cancellable, with nothing left behind."""

from __future__ import annotations

import asyncio
import os


async def readable(fd: int) -> None:
    """Wait until ``fd`` can be read without blocking; for a pidfd: until its process has ended."""
    own = os.dup(fd)  # a loop knows one reader a descriptor, and several tasks may wait for it
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    loop.add_reader(own, _set, done)
    try:
        await done
    finally:
        loop.remove_reader(own)
        os.close(own)


async def writable(fd: int) -> None:
    """Wait until ``fd`` can be written without blocking."""
    own = os.dup(fd)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    loop.add_writer(own, _set, done)
    try:
        await done
    finally:
        loop.remove_writer(own)
        os.close(own)


def _set(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
