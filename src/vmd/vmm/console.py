"""The guest's serial line, through the two FIFOs of a VM's directory.

One command line in, one answer line out. Each question carries a random tag that the guest
repeats, so answers to a question that was given up, and whatever else the guest prints, are told
apart and dropped. Any process that may open the FIFOs may ask: a lock keeps them one at a time.
Whether the VMM lives is read from the FIFOs themselves, whose other ends only it holds.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from .. import limits
from ..errors import TimedOut, UsageError, VmmError
from .process import CONSOLE_IN, CONSOLE_LOCK, CONSOLE_OUT
from .ready import writable

_LOCK_RETRY_SECONDS = 0.002
_CHUNK_BYTES = 65536


class Console:
    """Asks the guest whose VMM was started in ``directory``. Holds nothing open between calls.

    ``alive``: a second opinion on the VMM, asked before each wait.
    """

    def __init__(self, directory: Path, alive: Callable[[], bool] = lambda: True) -> None:
        self._directory = directory
        self._alive = alive

    async def ask(self, line: str, seconds: float) -> str:
        """Send one command line and return the guest's answer, without tag and line end.

        ``seconds`` bounds all of it, the wait for other askers included (`TimedOut`; the guest may
        still act on the line). Raises `UsageError` for a line that the guest cannot be sent, `VmmError` when
        the VMM is dead or the answer longer than `limits.CONSOLE_REPLY_BYTES_MAX`.
        """
        # Four characters: each costs the guest two VM exits, and one stale answer in 16 million is rare enough.
        tag = f"#{secrets.token_urlsafe(3)} ".encode()
        message = tag + _checked(line, len(tag)) + b"\n"
        try:
            async with asyncio.timeout(seconds), self._turn():
                with _Fifo(self._directory / CONSOLE_OUT, os.O_RDONLY) as output:
                    output.drain()
                    with _Fifo(self._directory / CONSOLE_IN, os.O_WRONLY) as stdin:
                        await self._write(stdin, message)
                    # The tag counts wherever it stands: the line before it may have lost its end.
                    return await self._find(output, lambda text: text.partition(tag)[2] if tag in text else None)
        except TimeoutError:
            raise TimedOut(f"console: no answer to {line!r} within {seconds:g} s") from None

    async def wait_line(self, prefix: str, seconds: float) -> str:
        """Wait for a line that begins with ``prefix`` and return it; earlier lines are dropped.

        What the guest printed before the call is still there, up to the pipe's 64 KiB. Errors as
        in `ask`.
        """
        start = prefix.encode()
        try:
            async with asyncio.timeout(seconds), self._turn():
                with _Fifo(self._directory / CONSOLE_OUT, os.O_RDONLY) as output:
                    return await self._find(output, lambda text: text if text.startswith(start) else None)
        except TimeoutError:
            raise TimedOut(f"console: no line {prefix!r} within {seconds:g} s") from None

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            lock = os.open(self._directory / CONSOLE_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as failure:
            raise VmmError(f"console: {self._directory / CONSOLE_LOCK}: {failure.strerror}") from failure
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    await asyncio.sleep(_LOCK_RETRY_SECONDS)
            yield
        finally:
            os.close(lock)

    async def _write(self, fifo: _Fifo, message: bytes) -> None:
        # Shorter than PIPE_BUF, so all or nothing (pipe(7)).
        while not fifo.write(message):
            self._check_alive()
            await fifo.ready()

    async def _find(self, fifo: _Fifo, wanted: Callable[[bytes], bytes | None]) -> str:
        text = bytearray()
        while True:
            chunk = fifo.read()
            if chunk is None:
                self._check_alive()
                await fifo.ready()
                continue
            text += chunk
            *lines, rest = bytes(text).split(b"\n")
            for line in lines:
                found = wanted(line)
                if found is not None:
                    return found.decode("utf-8", "replace").rstrip("\r")
            if len(rest) > limits.CONSOLE_REPLY_BYTES_MAX:
                if wanted(rest) is not None:
                    raise VmmError(f"console: an answer of more than {limits.CONSOLE_REPLY_BYTES_MAX} bytes")
                rest = rest[-limits.CONSOLE_LINE_BYTES_MAX :]  # a tag cut in two is still whole
            text[:] = rest
            await asyncio.sleep(0)  # a guest that never stops printing must not hold the loop

    def _check_alive(self) -> None:
        if not self._alive():
            raise VmmError("console: the VMM has exited")


class _Fifo:
    """One non-blocking end of a FIFO whose other end is a VMM's, open while in use."""

    def __init__(self, path: Path, flags: int) -> None:
        self._writes = flags == os.O_WRONLY
        self._arrived: asyncio.Event | None = None
        try:
            self._fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as failure:
            # ENXIO: nobody has the other end.
            why = "the VMM has exited" if failure.errno == errno.ENXIO else failure.strerror
            raise VmmError(f"console: {path}: {why}") from failure

    def __enter__(self) -> _Fifo:
        return self

    def __exit__(self, *_: object) -> None:
        if self._arrived is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    def read(self) -> bytes | None:
        """What is there; None when nothing is. Raises `VmmError` at the end of file."""
        try:
            chunk = os.read(self._fd, _CHUNK_BYTES)
        except BlockingIOError:
            return None
        if not chunk:
            raise VmmError("console: the VMM has exited")
        return chunk

    def write(self, message: bytes) -> bool:
        """Write all of ``message``, or nothing and False when the FIFO is full."""
        try:
            os.write(self._fd, message)
        except BlockingIOError:
            return False
        except BrokenPipeError:
            raise VmmError("console: the VMM has exited") from None
        return True

    def drain(self) -> None:
        """Drop what a pipe holds at most; a guest that prints on is dealt with line by line."""
        for _ in range(16):
            if self.read() is None:
                return

    async def ready(self) -> None:
        """Wait until it can be read, or written."""
        if self._writes:
            await writable(self._fd)
            return
        if self._arrived is None:
            # Once for all waits: a guest's line arrives character by character.
            self._arrived = asyncio.Event()
            asyncio.get_running_loop().add_reader(self._fd, self._arrived.set)
        self._arrived.clear()
        await self._arrived.wait()


def _checked(line: str, tag_bytes: int) -> bytes:
    if not (line.isascii() and line.isprintable()) or not line.strip():
        raise UsageError(f"console: a command is one line of printable ASCII, not {line[:80]!r}")
    if len(line) + tag_bytes > limits.CONSOLE_LINE_BYTES_MAX:
        most = limits.CONSOLE_LINE_BYTES_MAX - tag_bytes
        raise UsageError(f"console: a command of {len(line)} bytes; {most} is the most")
    return line.encode()
