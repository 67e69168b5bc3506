"""Stop a core's threads at chosen points of their work: a race whose order the test decides."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

WAIT_SECONDS = 20.0


class Held:
    """The threads that this process's main thread begins while it is open; see tracer.py for the stops.

    ``pid``: all threads but the main one of another process, those that it begins later too.
    """

    def __init__(self, pid: int | None = None, **stops: int) -> None:
        self._whom = [str(os.getpid())] if pid is None else [str(pid), "all"]
        self._stops = stops

    def __enter__(self) -> Self:
        script = Path(__file__).with_name("tracer.py")
        self._process = subprocess.Popen(
            [sys.executable, "-S", str(script), *self._whom],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin is not None
        self._seen = b""
        self.wait("ready")
        self._process.stdin.write(json.dumps(self._stops).encode() + b"\n")
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()

    def wait(self, stop: str, seconds: float = WAIT_SECONDS) -> None:
        """Wait until a thread has come to ``stop``."""
        assert self.has_come(stop, seconds), f"no thread came to {stop} within {seconds} s"

    def has_come(self, stop: str, seconds: float) -> bool:
        """Whether a thread has come to ``stop`` within so many seconds."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while stop not in self._seen.decode().split("\n")[:-1]:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return False
                data = os.read(self._process.stdout.fileno(), 4096)
                assert data, f"the tracer ended with {self._process.wait()}"
                self._seen += data
        return True

    def let_go(self) -> None:
        """Let all threads go on. Idempotent."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(WAIT_SECONDS)
        self._process.stdout.close()
