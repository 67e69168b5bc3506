"""`vmd pages serve` and `vmd pages adopt` as processes of their own, seen from outside only."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from tests.fakes.vmm import FakeVmm, eventually

VMD = str(Path(sys.prefix, "bin", "vmd"))
WAIT_SECONDS = 20.0
PAIR_PAGES = 8
"""Pages of the memory file of the fixture ``pair``."""

MakeMemory = Callable[..., Path]
MakeVmm = Callable[..., FakeVmm]

COUNTS = ("faults", "demand", "replayed", "prefetched", "zero", "removed", "poisoned", "present", "parked")


class Command:
    """One run of a command. Its output goes to files, so that it can be read at any time."""

    def __init__(self, directory: Path, words: Iterable[str | Path], env: Mapping[str, str]) -> None:
        self.stats_path = directory / "stats.json"
        self._out, self._err = directory / "stdout", directory / "stderr"
        words = [VMD, "pages", *words]
        if "--stats" not in words:
            words += ["--stats", self.stats_path]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **env}
            )
        self.pid = self.process.pid
        self._pidfd = os.pidfd_open(self.pid)

    # --- what it says ----------------------------------------------------------------------------

    def stdout(self) -> str:
        return self._out.read_text()

    def stderr(self) -> str:
        return self._err.read_text()

    def lines(self) -> list[str]:
        """The lines of stderr."""
        return self.stderr().splitlines()

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stats_path.read_bytes())
        return found

    def fresh_stats(self) -> dict[str, Any]:
        """Statistics written after this was called, by SIGUSR1."""
        before = self.stats_path.stat().st_ino, self.stats_path.stat().st_mtime_ns
        self.send(signal.SIGUSR1)
        eventually(lambda: self._stamp() != before, "the statistics are replaced")
        return self.stats()

    def when(self, **wanted: object) -> dict[str, Any]:
        """Wait until the statistics hold all of this: them."""
        return eventually(
            lambda: self._matching(wanted), f"statistics with {wanted}; stderr {self.stderr()!r}", WAIT_SECONDS
        )

    def _matching(self, wanted: Mapping[str, object]) -> dict[str, Any] | None:
        stats = self.stats() if self.stats_path.exists() else {}
        return stats if stats and all(stats[key] == value for key, value in wanted.items()) else None

    def _stamp(self) -> tuple[int, int]:
        status = self.stats_path.stat()
        return status.st_ino, status.st_mtime_ns

    # --- its life --------------------------------------------------------------------------------

    def wait_ready(self) -> Self:
        eventually(lambda: self.stdout() or self.process.poll() is not None, "ready", WAIT_SECONDS)
        assert self.stdout() == "ready\n", (self.process.poll(), self.stdout(), self.stderr())
        return self

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        """Stop all its threads, until SIGCONT or SIGKILL."""
        self.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def kill(self) -> None:
        """SIGKILL: it can neither say nor remove anything."""
        self.process.kill()
        self.process.wait()

    def has_ended(self, seconds: float = 0.0) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def ends(self, code: int, seconds: float = WAIT_SECONDS) -> float:
        """Wait for its end with exit ``code``: how long that took, seconds."""
        since = time.monotonic()
        assert self.has_ended(seconds), f"still there after {seconds} s; stderr {self.stderr()!r}"
        took = time.monotonic() - since
        assert self.process.wait() == code, (self.process.returncode, self.stderr())
        return took

    def refused(self, *patterns: str, code: int = 1) -> str:
        """It ends with ``code`` and exactly one line, which matches all the patterns: that line."""
        self.ends(code)
        (line,) = self.lines()
        assert line.startswith("vmd: error: ")
        for pattern in patterns:
            assert re.search(pattern, line), (pattern, line)
        return line

    def descriptors(self) -> list[str]:
        """What its descriptors are, sorted; numbers of sockets and pipes left out."""
        links = []
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            links.append(re.sub(r":\[\d+\]$", "", os.fsdecode(fd.readlink())))
        return sorted(links)

    def close(self) -> None:
        """Kill it if it lives. Checks what always holds."""
        if self.process.poll() is None:
            self.kill()
        os.close(self._pidfd)
        assert "Traceback" not in self.stderr(), self.stderr()
        assert self.stdout() in ("", "ready\n"), self.stdout()


class PageServer(Command):
    """One run of `vmd pages serve`."""

    def __init__(
        self, directory: Path, socket: Path, memory: Path, options: Iterable[str | Path], env: Mapping[str, str]
    ) -> None:
        self.socket = socket
        super().__init__(directory, ["serve", "--socket", socket, "--memory", memory, *options], env)

    def kill(self) -> None:
        """See `Command`. Its socket is removed for it."""
        super().kill()
        self.socket.unlink(missing_ok=True)


class Adopter(Command):
    """One run of `vmd pages adopt`."""

    def __init__(self, directory: Path, pid: int, journal: Path, options: Iterable[str | Path]) -> None:
        words: list[str | Path] = ["adopt", "--pid", str(pid), "--journal", journal, *options]
        super().__init__(directory, words, {"VMD_CORE": "native"})


class Adopt(Protocol):
    """Runs `vmd pages adopt` and, with ``ready``, waits until it serves."""

    def __call__(self, pid: int, journal: Path, *options: str | Path, ready: bool = ...) -> Adopter: ...


@dataclass(frozen=True)
class Journalled:
    """A VMM, and the page server that serves it with a journal."""

    server: PageServer
    vmm: FakeVmm
    memory: Path
    journal: Path

    @property
    def frozen_line(self) -> str:
        """What a server says that leaves it."""
        way = f"vmd pages adopt --pid {self.vmm.pid} --journal {self.journal} goes on"
        return f"vmd: warning: vmm {self.vmm.pid} left frozen; {way}"


class MakeJournalled(Protocol):
    """Start both: ``pages`` and ``holes`` of the memory file, further options of the server."""

    def __call__(self, *options: str | Path, pages: int = ..., holes: Collection[int] = ...) -> Journalled: ...


class Serve(Protocol):
    """Runs `vmd pages serve` and, with ``ready``, waits until it listens. ``core`` is its VMD_CORE."""

    def __call__(
        self,
        memory: Path,
        *options: str | Path,
        core: str = ...,
        socket: Path | None = ...,
        ready: bool = ...,
        env: Mapping[str, str] | None = ...,
    ) -> PageServer: ...


def installed(stats: Mapping[str, Any]) -> int:
    """The pages that the statistics say are resident."""
    total: int = stats["demand"] + stats["replayed"] + stats["prefetched"] + stats["zero"] - stats["removed"]
    return total


def serves(server: PageServer, vmm: FakeVmm, pages: int = PAIR_PAGES) -> None:
    """The VM has its memory; the server ends well with it, without a word."""
    assert vmm.verdicts() == ["image"] * pages
    vmm.kill()
    server.ends(0)
    assert (server.stdout(), server.stderr()) == ("ready\n", "")
