"""The test's end of the fake VMM: start it, tell it what to do, look at it from outside."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from vmd.pages import uffd
from vmd.pages.regions import SYSTEM_PAGE, Region, Regions

PRESENT = 1 << 63  # of a pagemap entry
WAIT_SECONDS = 20.0
_STEP_SECONDS = 0.002

T = TypeVar("T")


def eventually(look: Callable[[], T | None], what: str = "", seconds: float = WAIT_SECONDS) -> T:
    """Look again and again until it is true; fail with ``what`` and the last look after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or look} (last: {seen!r})"
        time.sleep(_STEP_SECONDS)


class Span(NamedTuple):
    """A region to be: so many pages of memory, the image's bytes from this page of the file on."""

    pages: int
    image_page: int


class Job:
    """Threads in the fake VMM that work through their addresses."""

    def __init__(self, vmm: FakeVmm, number: int) -> None:
        self._vmm = vmm
        self._number = number

    def results(self) -> list[list[str]] | None:
        """What each thread said of each address; None while one of them is still at it."""
        answer: list[list[str]] | None = self._vmm.tell("status", job=self._number)
        return answer

    def wait(self, seconds: float = WAIT_SECONDS) -> list[list[str]]:
        """Its results, once all threads are done."""
        return eventually(self.results, "the job is done", seconds)


class FakeVmm:
    """One fake VMM. Pages are numbered as in `Regions`: from 0, in order of address."""

    def __init__(
        self,
        image: Path,
        spans: Sequence[Span],
        page_size: int = SYSTEM_PAGE,
        features: int = uffd.FEATURE_EVENT_REMOVE,
    ) -> None:
        ours, theirs = socket.socketpair()
        script = Path(__file__).with_name("process.py")
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(script), str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._control = ours
        self._lines = ours.makefile("rwb")
        self.pid = self.process.pid
        sizes = [(span.pages * page_size, span.image_page * page_size) for span in spans]
        try:
            bases = self.tell("setup", image=str(image), spans=sizes, page_size=page_size, features=features)
        except BaseException:
            self.close()
            raise
        regions = [Region(base, size, offset) for base, (size, offset) in zip(bases, sizes, strict=True)]
        self.regions = Regions(regions, page_size, image.stat().st_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tell(self, command: str, **keys: Any) -> Any:
        """Give one command and take its answer. Raises OSError as the process saw it, `EOFError` when it died."""
        try:
            self._lines.write(json.dumps({"do": command, **keys}).encode() + b"\n")
            self._lines.flush()
            line = self._lines.readline()
        except (BrokenPipeError, ConnectionResetError):
            line = b""
        if not line:
            raise EOFError(f"the fake VMM died (exit code {self.process.wait()})")
        answer = json.loads(line)
        if "error" in answer:
            raise OSError(answer["errno"], answer["error"])
        return answer["ok"]

    # --- handshake -------------------------------------------------------------------------------

    def body(self, order: Iterable[int] | None = None, **extra: Any) -> list[dict[str, Any]]:
        """The handshake's regions as Firecracker names them, in ``order`` (default: by address)."""
        ordered = self.regions.ordered
        return [
            {
                "base_host_virt_addr": ordered[at].base,
                "size": ordered[at].size,
                "offset": ordered[at].offset,
                "page_size": self.regions.page_size,
                "page_size_kib": self.regions.page_size,
                **extra,
            }
            for at in (range(len(ordered)) if order is None else order)
        ]

    def handshake(self, path: Path, body: object = None) -> None:
        """Connect and send a good handshake, or ``body`` as JSON, in one message with the userfaultfd."""
        self.connect(path)
        self.send(json.dumps(self.body() if body is None else body).encode(), "uffd")

    def connect(self, path: Path) -> None:
        """Connect to a page server."""
        self.tell("connect", path=str(path))

    def send(self, data: bytes, *descriptors: str) -> None:
        """Send one message with descriptors of these kinds: ``uffd``, ``null``, ``eventfd``."""
        self.tell("send", data=base64.b64encode(data).decode(), descriptors=descriptors)

    def hang_up(self) -> None:
        """Close its end of the connection."""
        self.tell("hang_up")

    # --- memory ----------------------------------------------------------------------------------

    def start(self, kind: str, pages: Iterable[int], *, threads: int = 1, rounds: int = 1, split: bool = False) -> Job:
        """Begin to do ``kind`` to these pages (a method of process.Worker); the job says when it is done.

        With several threads each does all pages, or with ``split`` each its share.
        """
        addresses = [self.regions.address(page) for page in pages]
        return self.start_at(kind, addresses, threads=threads, rounds=rounds, split=split)

    def start_at(
        self, kind: str, addresses: Sequence[int], *, threads: int = 1, rounds: int = 1, split: bool = False
    ) -> Job:
        """As `start`, at host addresses."""
        shares = [list(addresses[at::threads]) if split else list(addresses) for at in range(threads)]
        return Job(self, self.tell("start", kind=kind, shares=shares, rounds=rounds))

    def start_last(self, kind: str, pages: Iterable[int]) -> None:
        """`start`, for what makes a core kill the VMM: that may come before the VMM has answered."""
        with suppress(EOFError):
            self.start(kind, pages)

    def do(self, kind: str, pages: Iterable[int], **keys: Any) -> list[str]:
        """Do ``kind`` to these pages in one thread and wait: the results in the order of the pages."""
        return self.start(kind, pages, **keys).wait()[0]

    def verdicts(self, pages: Iterable[int] | None = None) -> list[str]:
        """``zero``, ``image`` or ``other`` for these pages (default: all), every byte of them. Touches them."""
        return self.do("verdict", range(self.regions.pages) if pages is None else pages)

    # --- from outside ----------------------------------------------------------------------------

    def resident(self) -> set[int]:
        """The pages that are in its memory, read from outside without touching any."""
        found = set()
        with Path(f"/proc/{self.pid}/pagemap").open("rb", buffering=0) as pagemap:
            for page in range(self.regions.pages):
                entry = os.pread(pagemap.fileno(), 8, self.regions.address(page) // SYSTEM_PAGE * 8)
                if struct.unpack("Q", entry)[0] & PRESENT:
                    found.add(page)
        return found

    def blocked(self) -> int:
        """How many of its threads wait for a page."""
        return self.blocked_in("handle_userfault")

    def blocked_in(self, function: str) -> int:
        """How many of its threads have this function on their kernel stack."""
        stacks = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            try:
                stacks.append((task / "stack").read_text())
            except OSError:  # it has just ended
                continue
        return sum(function in stack for stack in stacks)

    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, without waiting."""
        self.process.send_signal(signal.SIGKILL)

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Wait for its death: its return code, negative for a signal."""
        return self.process.wait(seconds)

    def close(self) -> None:
        """Kill and reap it, close everything. Idempotent."""
        self.process.kill()
        self.process.wait(WAIT_SECONDS)
        self._lines.close()
        self._control.close()
