"""Runs scenarios on a real core over a real userfaultfd, with a VMM that is a process of its own.

`Stage` holds what scenarios share: the core's name, an image, a nursery of VMMs and the one in use. A run sends
the guest's lines in batches, from one event of the page server's life to the next, and looks meanwhile whether the
page server has died: then it is adopted at once. A VMM is used again unless it exited or its run failed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from array import array
from collections import Counter
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Self

from tests.contract.world import is_readable, write_image
from vmd.pages.contract import Beside, Death, EndReason, PageCore, Service
from vmd.pages.cores import make_core
from vmd.pages.handshake import Handshake
from vmd.pages.journal import Journal
from vmd.pages.regions import SYSTEM_PAGE, Region, Regions
from vmd.pages.source import Image

from . import guest
from .language import HOLES, PAGES, Deed, KillAt, Op, Plain, Scenario, Serve, Thread

HANG_SECONDS = 20.0
"""What takes milliseconds and has not happened by then does not happen."""
AGAIN_SECONDS, AGAIN_ROUNDS = 0.5, 100
"""Once a run has failed: what comes then are attempts to see it again, in less, and threads may have to meet for it."""
_ROOT = Path(__file__).parents[2]
_PACKET_BYTES = 1 << 16
_PRESENT = 1 << 63  # of a pagemap entry


_Line = tuple[int, int, str, int, int]
"""Place in the scenario, thread (0: main), what, first page, page after the last."""


class Failure(AssertionError):
    """A scenario went wrong on a real core."""


class Vmm:
    """The driver's end of `vmm_process.Vmm`. Owns its sockets and descriptors."""

    def __init__(self, nursery: socket.socket) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(nursery, [b"."], [theirs.fileno()])
        self.pid = int(nursery.recv(16))
        self.pidfd = os.pidfd_open(self.pid)
        self._pagemap = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def send(self, *packet: Any) -> None:
        self.control.send(json.dumps(packet).encode())

    def answer(self) -> Any:
        return json.loads(self.control.recv(_PACKET_BYTES))

    def fresh(self) -> tuple[int, int]:
        """Fresh memory: its address, and a copy of the userfaultfd, which is the caller's."""
        self.send("fresh")
        data, fds, _, _ = socket.recv_fds(self.control, _PACKET_BYTES, 1)
        return json.loads(data), fds[0]

    def resident(self, base: int) -> int:
        """How many pages of guest memory are in."""
        entries = os.pread(self._pagemap, 8 * PAGES, base // SYSTEM_PAGE * 8)
        return sum(bool(entry & _PRESENT) for (entry,) in struct.iter_unpack("Q", entries))

    def close(self) -> None:
        """It ends when its driver hangs up, or, in the middle of something, by SIGKILL."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        for fd in (self.pidfd, self._pagemap):
            os.close(fd)
        self.control.close()


class Stage:
    """Where scenarios are run with one kind of core."""

    def __init__(self, core: str, folder: Path) -> None:
        self.core = core
        self.memory = write_image(folder / "scenario-memory", PAGES, HOLES, SYSTEM_PAGE).path
        self._journals = (folder / f"journal-{number}" for number in count())
        self._nursery, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.scenario.vmm_process", str(theirs.fileno()), str(self.memory)]
            self._process = subprocess.Popen(command, cwd=_ROOT, pass_fds=[theirs.fileno()])
        self.deaths: Counter[str] = Counter()
        """Points at which cores were to die, and did."""
        self._vmm: Vmm | None = None
        self.be_patient()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()
        self._nursery.close()
        self._process.wait(HANG_SECONDS)

    def be_patient(self, seconds: float = HANG_SECONDS, rounds: int = 1) -> None:
        """Wait so long for a guest, and run each scenario so often; a failure makes it hasty and stubborn."""
        self.patience, self.rounds = seconds, rounds

    def run(self, scenario: Scenario) -> None:
        """Run it. Raises `Failure` with the scenario's text when the guest saw what it may not, or hung."""
        for _ in range(self.rounds):
            self._run(scenario)

    def _run(self, scenario: Scenario) -> None:
        self._vmm = self._vmm or Vmm(self._nursery)
        run = _Run(self, scenario, self._vmm, next(self._journals))
        try:
            run.play()
        except Failure as failure:
            self.rest()
            self.be_patient(AGAIN_SECONDS, AGAIN_ROUNDS)
            again = f"{sys.executable} -m tests.scenario {self.core} '{scenario}'"
            raise Failure(f"{failure}\nresults: {run.results}\nscenario: {scenario}\nreplay: {again}") from None
        except BaseException:
            self.rest()
            raise
        finally:
            run.close()
        if scenario.has("exit"):
            self.rest()

    def rest(self) -> None:
        """Leave no VMM behind; the next run makes another."""
        if self._vmm is not None:
            self._vmm.close()
            self._vmm = None


class _Run:
    """One scenario on one VMM."""

    def __init__(self, stage: Stage, scenario: Scenario, vmm: Vmm, journal: Path) -> None:
        self.results: guest.Results = {}
        self._stage = stage
        self._scenario = scenario
        self._vmm = vmm
        self._journal = journal
        self._core: PageCore | None = None
        self._deaths: list[KillAt] = []  # of page servers that have not started
        self._death: Death | None = None  # of the one that serves
        self._exited = False
        self._base, self._uffd = vmm.fresh()

    def play(self) -> None:
        """Do all operations and look at what came of them."""
        batch: list[_Line] = []
        for at, op in enumerate(self._scenario.ops):
            if (line := _line(at, op)) is not None:
                batch.append(line)
            else:
                self._send(batch)
                batch = []
                self._event(op)
        if not self._exited:
            self._send([*batch, (-1, 0, "join", 0, 0)])
        self._judge()
        self._stop()

    def _event(self, op: Op) -> None:
        match op:
            case KillAt():
                self._deaths.append(op)
            case Serve():
                self._serve(op)
            case Plain("kill"):
                self._kill()
            case Plain("adopt"):
                self._adopt()
            case Plain("exit"):
                self._vmm.send("exit")
                self._exited = True
                self._await_end()

    def _send(self, batch: list[_Line]) -> None:
        """Have the guest do these lines and wait for the main thread to be through."""
        if not batch:
            return
        self._vmm.send("play", batch)
        deadline = time.monotonic() + self._stage.patience
        while not self._answered(max(0.0, deadline - time.monotonic())):
            if time.monotonic() > deadline:
                raise Failure(f"the guest hangs; page server: {self._core and self._core.counters()}")
        answer: dict[str, Any] = self._vmm.answer()
        self.results = {int(at): tuple(seen) if isinstance(seen, list) else seen for at, seen in answer.items()}

    def _answered(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._vmm.control, select.POLLIN)
        if self._core is not None:
            poll.register(self._core.ended_fd, select.POLLIN)
        ready = dict(poll.poll(seconds * 1000))
        if self._core is not None and self._core.ended_fd in ready:
            self._died()
        return self._vmm.control.fileno() in ready

    # --- the page server's life ------------------------------------------------------------------

    def _serve(self, op: Serve) -> None:
        regions = Regions([Region(self._base, PAGES * SYSTEM_PAGE, 0)], SYSTEM_PAGE, PAGES * SYSTEM_PAGE)
        uffd, self._uffd = self._uffd, -1
        handshake = Handshake(uffd, os.dup(self._vmm.pidfd), self._vmm.pid, regions, socket.socket())
        image, offsets = Image(self._stage.memory), array("Q", [page * SYSTEM_PAGE for page in op.replay])
        service = Service(Beside(op.beside), offsets, prefetch_bytes_max=PAGES * SYSTEM_PAGE, death=self._next_death())
        if self._scenario.has("kill"):
            self._core = _mortal(handshake, image, service, self._journal)
        else:
            self._core = make_core(self._stage.core, handshake, image, service)
        self._core.start()

    def _next_death(self) -> Death | None:
        at = self._deaths.pop(0) if self._deaths else None
        self._death = Death(at.point, at.after) if at else None
        return self._death

    def _died(self) -> None:
        """The page server ended by itself: as it was to, or by a fault of its own."""
        self._ended(EndReason.DIED)
        self._adopt()

    def _kill(self) -> None:
        from vmd.pages.native import NativeCore

        assert isinstance(self._core, NativeCore)
        self._death = None
        self._core.kill()
        self._ended(EndReason.DIED)

    def _adopt(self) -> None:
        from vmd.pages.native import NativeCore

        self._core = NativeCore.adopt(self._journal, self._vmm.pid, Service(death=self._next_death()))
        if self._core is None:
            raise Failure("the VMM has exited")
        self._core.start()

    def _ended(self, *reasons: EndReason) -> None:
        """The page server has ended, or does so now, for one of these reasons."""
        if self._core is not None:
            ended, self._core = self._core.join(), None
            if ended.reason is EndReason.DIED and self._death is not None:
                self._stage.deaths[self._death.point] += 1
            if ended.reason not in reasons:
                raise Failure(f"the page server ended: {ended}")

    def _await_end(self) -> None:
        """The VMM has exited: its page server must end."""
        if self._core is None:
            return
        deadline = time.monotonic() + self._stage.patience
        while not is_readable(self._core.ended_fd):
            if time.monotonic() > deadline:
                raise Failure("the page server does not end with its VMM")
            time.sleep(0.0002)
        self._ended(EndReason.GONE, EndReason.DIED)

    def _judge(self) -> None:
        if wrong := guest.explain(self._scenario, self.results):
            raise Failure(wrong)
        if not self._exited:
            self._add_up()

    def _add_up(self) -> None:
        """What is in must be counted, a page just after it is in.

        Of what one thread removes while another touches it a page may be taken away uncounted.
        """
        deadline = time.monotonic() + self._stage.patience
        while self._core is not None:
            now = self._core.counters()
            said = now.demand + now.replayed + now.prefetched + now.zero - now.removed
            resident = self._vmm.resident(self._base)
            if said == resident or (said > resident and self._scenario.has("thread")):
                return
            if time.monotonic() > deadline:
                raise Failure(f"{said} pages are counted, {resident} are in; {now}")
            if is_readable(self._core.ended_fd):
                self._died()

    def _stop(self) -> None:
        if self._core is not None:
            self._core.stop()
            self._ended(EndReason.STOPPED, EndReason.DIED)

    def close(self) -> None:
        """Stop the page server, whatever state it is in."""
        if self._uffd >= 0:
            os.close(self._uffd)
        if self._core is not None:
            self._core.stop()
            self._core.join()
        self._journal.unlink(missing_ok=True)


def _line(at: int, op: Op) -> _Line | None:
    """What the guest has to do for an operation; None where it has no part."""
    match op:
        case Thread(number, deed):
            return at, number, *_deed(deed)
        case Plain("join" | "check all"):
            return at, 0, op.words, 0, 0
        case Serve() | KillAt() | Plain():
            return None
        case deed:
            return at, 0, *_deed(deed)


def _deed(deed: Deed) -> tuple[str, int, int]:
    return str(deed).split()[0], deed.pages.start, deed.pages.stop


def _mortal(handshake: Handshake, image: Image, service: Service, path: Path) -> PageCore:
    """A native core that can die and be adopted."""
    from vmd.pages.native import NativeCore

    journal = Journal.create(path, image, "native")
    try:
        return NativeCore(handshake, image, service, journal)
    finally:
        journal.close()
