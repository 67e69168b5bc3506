"""What the commands share: how they begin, how they wait, how they speak."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import click

from .. import sandbox, store, template
from ..settings import Settings
from . import TERMINATED

T = TypeVar("T")

# Back to the start of the line, and erase it (ECMA-48).
_CLEAR = "\r\x1b[K"

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def begin() -> Settings:
    """Read the environment, and sweep what processes that died left behind. Raises `UsageError`."""
    settings = Settings.read()
    try:
        store.sweep_runs(settings)
        template.sweep(settings)
        sandbox.recover(settings, warn)
    except OSError as failure:  # no reason not to do what was asked for
        warn(f"sweep: {failure.filename}: {failure.strerror}")
    return settings


def wait(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` to its end. SIGINT and SIGTERM cancel it, so that it can undo: codes 130 and 143."""
    return asyncio.run(_cancelled_by_sigterm(work))


async def _cancelled_by_sigterm(work: Coroutine[Any, Any, T]) -> T:
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    terminated = False

    def terminate() -> None:
        nonlocal terminated
        terminated = True
        task.cancel()

    loop.add_signal_handler(signal.SIGTERM, terminate)
    try:
        return await task
    except asyncio.CancelledError:
        if terminated:
            raise SystemExit(TERMINATED) from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def emit(content: object) -> None:
    """Print ``content`` as JSON."""
    print(json.dumps(content, indent=2))


def warn(line: str) -> None:
    """One warning, on stderr."""
    over = _CLEAR if sys.stderr.isatty() else ""  # progress may stand there
    print(f"{over}vmd: warning: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Shows what is going on while somebody looks: one line that changes, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda line: None
        return
    try:
        yield lambda line: print(f"{_CLEAR}vmd: {line}", end="", file=sys.stderr, flush=True)
    finally:
        print(_CLEAR, end="", file=sys.stderr, flush=True)


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns, two blanks apart."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def age(since: float) -> str:
    """How long ago a time (seconds since the epoch) was, in one unit."""
    seconds = max(0, int(time.time() - since))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
