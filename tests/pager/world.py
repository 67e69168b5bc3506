"""What a test of the pager is about: a run directory, fake VMMs in it, and the pager that serves them."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import struct
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import pytest
import vmd_core

from tests.contract.world import Memory, shake_hands, write_image
from tests.fakes.vmm import FakeVmm, Span, eventually
from tests.fakes.vmm.driver import WAIT_SECONDS
from vmd import limits, sandbox
from vmd.pager import look, start
from vmd.pager.control import Control
from vmd.pager.handed import PagerCore
from vmd.pages.contract import Counters, Service
from vmd.pages.journal import Journal
from vmd.pages.source import Image
from vmd.settings import Settings
from vmd.store import RECORD, write_json
from vmd.vmm import process

SERVE, PUBLISH, STATUS, UPGRADE, REPLY, GONE, SYNC, READY, BYE = range(1, 10)
"""What can be said (`crates/vmd-core/src/pager/message.rs`)."""

HUNG_SECONDS = 0.3
_TGKILL = 234  # of x86-64


class Vm:
    """A fake VMM with its journal, handed over to the pager by `serve`; what it holds until then is `descriptors`."""

    def __init__(self, settings: Settings, name: str, memory: Memory, service: Service) -> None:
        self.name = name
        self.memory = memory
        self.directory = settings.run_dir / name
        self.directory.mkdir()
        with ExitStack() as undo:
            self.vmm = undo.enter_context(FakeVmm(memory.path, [Span(memory.pages, 0)]))
            self.image = undo.enter_context(closing(Image(memory.path)))
            shaken = shake_hands(self.vmm, self.directory / "pages.sock", memory)
            self.handshake = undo.enter_context(closing(shaken))
            made = Journal.create(self.directory / look.JOURNAL, self.image, "native")
            self.journal = undo.enter_context(closing(made))
            self.core = PagerCore(settings, name, self.handshake, self.image, service, self.journal)
            self._close = undo.pop_all()

    @property
    def descriptors(self) -> list[int]:
        """As `Control.serve` wants them: journal, userfaultfd, pidfd, image."""
        return [self.journal.fd, self.handshake.uffd, self.handshake.pidfd, self.image.fd]

    def serve(self) -> Vm:
        """Hand it over, as `vmd create` does."""
        self.core.start()
        return self

    def view(self) -> look.View:
        """What its journal says."""
        return look.read(self.journal.path)

    def counters(self) -> Counters:
        return self.view().counters

    def is_served(self) -> bool:
        return look.is_served(self.journal.path)

    def is_whole(self, pages: Collection[int] = ()) -> bool:
        """Whether the VM finds on these pages (default: all) what the image has there. Touches them."""
        return self.vmm.verdicts(pages or None) == self.memory.verdicts(pages or None)

    def record(self, settings: Settings) -> sandbox.Sandbox:
        """Record it as a sandbox, so that commands know of it."""
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        vmm = sandbox.Process(self.vmm.pid, process.start_time(self.vmm.pid))
        record = sandbox.Record(
            self.name, "t", "0" * 32, "uffd", "asked for", 0.0, {}, str(self.directory), boot_id, vmm, None,
            str(self.journal.path),
        )  # fmt: skip
        home = settings.state_dir / "sandboxes" / self.name
        home.mkdir(parents=True)
        write_json(home / RECORD, record.save())
        return sandbox.find(settings, self.name)

    def close(self) -> None:
        """Kill the VMM, wait until nobody serves it, and remove its journal. Idempotent."""
        self.vmm.close()
        self._close.close()
        self.core.stop()
        self.core.join()
        eventually(lambda: not self.is_served(), f"{self.name} is let go")
        self.journal.remove()


class Gate:
    """Where standbys wait before their first instruction: in a stand-in for the core that they load.

    To be made before the pager is started, which loads the same one.
    """

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self._fifo = directory / "gate"
        os.mkfifo(self._fifo)
        package = directory / "vmd_core"
        package.mkdir()
        real = Path(vmd_core.__file__).parents[1]
        (package / "__init__.py").write_text(
            f"import sys\nif '--standby' in sys.argv and open({str(self._fifo)!r}).read() == 'die':\n    sys.exit(3)\n"
            f"sys.path.insert(0, {str(real)!r})\ndel sys.modules['vmd_core']\nimport vmd_core\n"
        )
        patch.setattr(vmd_core, "__file__", str(package / "__init__.py"))

    def reached(self) -> None:
        """Wait until a standby is at it."""
        self._fd = eventually(self._try_open, "a standby is at the gate")

    def open(self, word: bytes = b"") -> None:
        """Let that one go on, or ``die``."""
        os.write(self._fd, word)
        os.close(self._fd)

    def _try_open(self) -> int | None:
        try:
            return os.open(self._fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads it
            return None


class Pids(NamedTuple):
    """Who is pager and who is standby."""

    pager: int
    standby: int


class Host:
    """The run directory of a test. Call it: ``host(name, pages=64, holes=(), replay=None)`` is a `Vm`, not served yet.

    At its end all VMs are killed, and with them pager and standby must end.
    """

    def __init__(self, settings: Settings, images: Path) -> None:
        self.settings = settings
        self.run_dir = settings.run_dir
        self.socket = self.run_dir / start.SOCKET
        self._images = images
        self._vms = ExitStack()

    def __call__(
        self, name: str, pages: int = 64, holes: Collection[int] = (), replay: Iterable[int] | None = None
    ) -> Vm:
        memory = write_image(self._images / name, pages, holes, 4096)
        vm = Vm(self.settings, name, memory, Service() if replay is None else memory.replay(replay))
        self._vms.callback(vm.close)
        return vm

    def serve(self, *names: str) -> list[Vm]:
        """VMs of these names, served."""
        return [self(name).serve() for name in names]

    def status(self) -> list[list[str]]:
        """The words of each line of the pager's status; a pager is started where there is none."""
        return [line.split() for line in start.request(self.settings, Control.status).splitlines()]

    def pids(self, other_than: int = 0) -> Pids:
        """Pager and standby, once the standby is ready and the pager not ``other_than``."""

        def both() -> Pids | None:
            told = {words[0]: words for words in self.status()}
            ready = told.get("standby", [])[2:] == ["ready"] and told["pager"][1] != str(other_than)
            return Pids(int(told["pager"][1]), int(told["standby"][1])) if ready else None

        return eventually(both, "pager and standby are ready")

    def pager(self) -> int:
        """The pager's pid."""
        return int(self.status()[0][1])

    def served(self) -> list[str]:
        """The names of the VMs that are served."""
        return [words[1] for words in self.status() if words[0] == "vm"]

    def connect(self) -> Control:
        """A connection to the pager that is there."""
        return Control(self.socket)

    def knock(self) -> Peer:
        """Somebody who is at the socket, and has been heard; a pager is started where there is none."""
        start.ensure(self.settings)
        peer = Peer(self.socket)
        peer.say(STATUS)
        assert peer.answer()
        return peer

    def log(self) -> list[str]:
        """The lines of the pager's log, without time and pid."""
        path = self.run_dir / start.LOG
        return re.sub(r"(?m)^\d+\.\d{3} \[\d+\] ", "", path.read_text()).splitlines() if path.exists() else []

    def says(self, pattern: str) -> None:
        """Wait until a line of the log matches."""
        eventually(lambda: any(re.search(pattern, line) for line in self.log()), f"{pattern} in {self.log()}")

    def kill_both(self) -> None:
        """Pager and standby die; the standby shall not be quicker than its own end."""
        pids = self.pids()
        os.kill(pids.standby, signal.SIGSTOP)
        for pid in pids:
            kill(pid)

    @contextmanager
    def hung(self) -> Iterator[None]:
        """The pager hangs meanwhile, and nobody waits for it for long."""
        pager = self.pids().pager
        os.kill(pager, signal.SIGSTOP)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "PAGER_REPLY_SECONDS", HUNG_SECONDS)
            yield
        os.kill(pager, signal.SIGCONT)

    def close(self) -> None:
        """End all VMs; then pager and standby must end by themselves, and leave only a log that says something."""
        self._vms.close()
        eventually(lambda: not self.processes(), "pager and standby end")
        left = {path.name: path.stat().st_size for path in self.run_dir.glob("pager.*")}
        assert not left or (list(left) == [start.LOG] and left[start.LOG]), left

    def processes(self) -> dict[int, str]:
        """Pid and name of all pagers and standbys of this run directory, living ones."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    line = (entry / "cmdline").read_bytes()
                    name = (entry / "comm").read_text().strip()
                except OSError:
                    continue
                if b"pager_main" in line and os.fsencode(self.run_dir) in line:
                    found[int(entry.name)] = name
        return found


class Peer:
    """Somebody at the pager's socket who says what he likes."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        seconds = struct.pack("ll", round(WAIT_SECONDS), 0)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)  # of a connect too
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        self.socket.connect(str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def say(self, kind: int, rest: bytes = b"", fds: Sequence[int] = ()) -> None:
        """One message of this kind."""
        self.send(struct.pack("<4sHH", b"vmdp", 1, kind) + rest, fds)

    def serve(self, name: str, vm: Vm) -> str | None:
        """Have it served, as `Control.serve` does: the answer."""
        self.say(SERVE, name.encode(), vm.descriptors)
        return self.answer()

    def send(self, packet: bytes, fds: Sequence[int] = ()) -> None:
        """One packet."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
        self.socket.sendmsg([packet], rights)

    def answer(self) -> str | None:
        """The text of the answer, after ``refused: `` when it is one; None: the pager has hung up."""
        try:
            packet = self.socket.recv(1 << 17)
        except ConnectionResetError:
            return None
        return "refused: " * packet[8] + packet[16:].decode() if packet else None


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal that ends it, and wait for the end."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, number)
        eventually(lambda: process.is_dead(pidfd), f"process {pid} ends")
        process.reap(pidfd)
    finally:
        os.close(pidfd)


def crash(pid: int, thread: str, number: int = signal.SIGSEGV) -> None:
    """A crash in the thread of this name, as far as a handler can tell; wait for the end of the process."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().strip() == thread:
            pidfd = os.pidfd_open(pid)
            assert ctypes.CDLL(None).syscall(_TGKILL, pid, int(task.name), number) == 0
            eventually(partial(process.is_dead, pidfd), f"process {pid} crashes")
            process.reap(pidfd)
            os.close(pidfd)
            return
    raise AssertionError(f"process {pid} has no thread {thread}")


def fds(pids: Iterable[int]) -> list[int]:
    """How many descriptors each of these processes has open."""
    return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids]
