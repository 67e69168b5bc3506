"""`vmd pages adopt`, what is refused: one line, code 1, and neither journal nor VM is touched."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vmm import FakeVmm, Job, Span, eventually
from tests.support.journal_file import JournalFile
from tests.system.pages_serve.command import VMD, Adopt, MakeJournalled, MakeVmm, PageServer, Serve
from vmd.pages import uffd

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd

PAGE, PAGES = 4096, 16


@dataclass(frozen=True)
class Orphan:
    """A VMM whose page server was killed: two pages are in, one was given back, one is waited for."""

    vmm: FakeVmm
    memory: Path
    journal: Path
    waits: Job

    def forged(self, path: Path, data: bytes | bytearray) -> Path:
        """Another journal."""
        path.write_bytes(data)
        return path

    def changed(self, path: Path, **fields: Any) -> Path:
        """The same journal but for these fields; its checksum is right."""
        return self.forged(path, replace(JournalFile.parse(self.journal.read_bytes()), **fields).pack())

    def is_untouched(self) -> bool:
        """Whether the VM is as its page server left it."""
        return self.vmm.is_alive() and self.vmm.resident() == {0, 1} and self.vmm.blocked() == 1


@pytest.fixture(scope="module")
def orphan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orphan]:
    """The one that all these refusals are about; in the end it can be adopted as if nothing had been."""
    directory = tmp_path_factory.mktemp("orphan")
    memory, journal = directory / "memory", directory / "journal"
    memory.write_bytes(b"".join(bytes([1 + page]) * PAGE for page in range(PAGES)))
    server = PageServer(directory, directory / "sock", memory, ["--no-prefetch", "--journal", journal], {})
    with ExitStack() as stack:
        stack.callback(server.close)
        vmm = stack.enter_context(FakeVmm(memory, [Span(PAGES, 0)]))
        server.wait_ready()
        vmm.handshake(server.socket)
        assert vmm.verdicts([0, 1, 2]) == ["image"] * 3
        assert vmm.do("remove", [2]) == ["ok"]
        server.kill()
        waits = vmm.start("verdict", [3])
        eventually(vmm.blocked, "it waits")
        yield Orphan(vmm, memory, journal, waits)
        words = [VMD, "pages", "adopt", "--pid", str(vmm.pid), "--journal", str(journal)]
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as adopter:
            assert waits.wait() == [["image"]]
            assert vmm.verdicts() == ["zero" if page == 2 else "image" for page in range(PAGES)]
            vmm.kill()
            assert adopter.communicate(timeout=20)[1] == b""
            assert adopter.returncode == 0


class Refuse:
    """Run the command; what it is given stays as it is, and so does the VM."""

    def __init__(self, adopt: Adopt, orphan: Orphan) -> None:
        self._adopt, self._orphan = adopt, orphan

    def __call__(self, journal: Path, *patterns: str, pid: int | None = None) -> str:
        before = _snapshot(journal)
        adopter = self._adopt(pid or self._orphan.vmm.pid, journal, ready=False)
        line = adopter.refused("^vmd: error: adopt: ", *patterns)
        assert adopter.stdout() == ""
        assert _snapshot(journal) == before
        assert self._orphan.is_untouched()
        return line


def _snapshot(path: Path) -> tuple[object, ...]:
    """All of a file that somebody might have changed."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return ()
    content = path.read_bytes() if path.is_file() else b""
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns, content


@pytest.fixture
def refuse(orphan: Orphan, adopt_pages: Adopt) -> Refuse:
    return Refuse(adopt_pages, orphan)


# --- which process ---------------------------------------------------------------------------------------


def test_a_pid_that_is_not_the_journals(refuse: Refuse, orphan: Orphan) -> None:
    for pid in (os.getpid(), _unused_pid(), (1 << 31) - 1):
        refuse(orphan.journal, f"its VMM is process {orphan.vmm.pid}, not {pid}$", pid=pid)


def _unused_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_vmm_that_does_not_run(refuse: Refuse, orphan: Orphan, tmp_path: Path) -> None:
    pid = _unused_pid()
    refuse(orphan.changed(tmp_path / "j", vmm_pid=pid), f"its VMM, process {pid}, does not run$", pid=pid)


def test_a_vmm_that_nobody_has_reaped(refuse: Refuse, orphan: Orphan, tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        fields = {"vmm_pid": process.pid, "vmm_start": _start_time(process.pid)}
        refuse(orphan.changed(tmp_path / "j", **fields), "does not run$", pid=process.pid)


def _start_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_a_process_that_was_started_at_another_time(refuse: Refuse, orphan: Orphan, tmp_path: Path) -> None:
    started = _start_time(orphan.vmm.pid)
    journal = orphan.changed(tmp_path / "j", vmm_start=started - 1)
    refuse(journal, "is not its VMM", f"expected start time {started - 1}, got {started}")


def test_another_boot(refuse: Refuse, orphan: Orphan, tmp_path: Path) -> None:
    refuse(orphan.changed(tmp_path / "j", boot_id=bytes(16)), "of another boot$")


def test_a_process_without_a_userfaultfd(refuse: Refuse, orphan: Orphan, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        fields = {"vmm_pid": process.pid, "vmm_start": _start_time(process.pid)}
        refuse(orphan.changed(tmp_path / "j", **fields), "one userfaultfd, it holds 0$", pid=process.pid)
        assert process.poll() is None
        process.kill()


def test_a_process_with_two_of_them(refuse: Refuse, orphan: Orphan, tmp_path: Path) -> None:
    fds = [uffd.create(), uffd.create()]
    fields = {"vmm_pid": os.getpid(), "vmm_start": _start_time(os.getpid())}
    refuse(orphan.changed(tmp_path / "j", **fields), "one userfaultfd, it holds 2$", pid=os.getpid())
    for fd in fds:
        os.close(fd)


@pytest.mark.parametrize("word", ["0", "-1", "x", str(1 << 31), "9" * 40])
def test_what_is_no_pid_is_usage(orphan: Orphan, word: str) -> None:
    words = [VMD, "pages", "adopt", "--pid", word, "--journal", str(orphan.journal)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("vmd: error: Invalid value for '--pid'")


# --- which journal ---------------------------------------------------------------------------------------


def test_no_journal(refuse: Refuse, tmp_path: Path) -> None:
    refuse(tmp_path / "none", "journal .*/none: No such file or directory$")


@pytest.mark.parametrize("size", [0, 143, 1024, 16392, -1])
def test_a_truncated_journal(refuse: Refuse, orphan: Orphan, tmp_path: Path, size: int) -> None:
    refuse(orphan.forged(tmp_path / "j", orphan.journal.read_bytes()[:size]), "journal .*/j: truncated: ")


def test_a_journal_with_something_behind_it(refuse: Refuse, orphan: Orphan, tmp_path: Path) -> None:
    refuse(orphan.forged(tmp_path / "j", orphan.journal.read_bytes() + b"\0"), "truncated: expected .* bytes, got ")


@pytest.mark.parametrize("at", [12, 16, 24, 40, 136, 16400])
def test_a_corrupt_journal(refuse: Refuse, orphan: Orphan, tmp_path: Path, at: int) -> None:
    data = bytearray(orphan.journal.read_bytes())
    data[at] ^= 1
    refuse(orphan.forged(tmp_path / "j", data), "journal .*/j: corrupt: ")


def test_what_is_no_journal(refuse: Refuse, orphan: Orphan, tmp_path: Path) -> None:
    refuse(orphan.forged(tmp_path / "j", b"x" * (1 << 15)), "not a journal: no magic$")
    refuse(orphan.memory, "not a journal: no magic$")


def test_another_version(refuse: Refuse, orphan: Orphan, tmp_path: Path) -> None:
    refuse(orphan.changed(tmp_path / "j", version=2), "of another version: expected 1, got 2$")


def test_before_the_handshake(refuse: Refuse, serve_pages: Serve, orphan: Orphan, run_dir: Path) -> None:
    journal = run_dir / "j"
    server = serve_pages(orphan.memory, "--journal", journal)
    refuse(journal, "locked: another page server is alive on it$")
    server.kill()
    refuse(journal, "no VMM has connected to its page server yet$")
    journal.unlink()


def test_a_vmm_whose_handshake_nobody_has_read(
    serve_pages: Serve, make_vmm: MakeVmm, adopt_pages: Adopt, orphan: Orphan, run_dir: Path
) -> None:
    """All that is known of it has died with its page server; it is for its owner to kill."""
    journal, vmm = run_dir / "j", make_vmm(orphan.memory)
    server = serve_pages(orphan.memory, "--journal", journal)
    server.stop()
    vmm.handshake(server.socket)
    server.kill()
    adopt_pages(vmm.pid, journal, ready=False).refused("no VMM has connected to its page server yet$")
    assert vmm.is_alive()
    journal.unlink()


def _device(path: Path) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))  # as /dev/null


def _bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, _device, _bound])
def test_what_is_no_file(refuse: Refuse, run_dir: Path, make: Callable[[Path], None]) -> None:
    path = run_dir / "j"
    make(path)
    refuse(path, "journal .*/j: (not a regular file|Is a directory|No such device or address)$")
    path.rmdir() if path.is_dir() else path.unlink()


def test_a_link_to_the_journal(refuse: Refuse, orphan: Orphan, tmp_path: Path) -> None:
    (tmp_path / "j").symlink_to(orphan.journal)
    refuse(tmp_path / "j", "journal .*/j: Too many levels of symbolic links$")


# --- which image -----------------------------------------------------------------------------------------


@contextmanager
def _put_aside(path: Path) -> Iterator[Path]:
    aside = path.with_name("aside")
    path.rename(aside)
    try:
        yield aside
    finally:
        aside.rename(path)


def test_an_image_that_was_removed(refuse: Refuse, orphan: Orphan) -> None:
    with _put_aside(orphan.memory):
        refuse(orphan.journal, f"memory {orphan.memory}: No such file or directory$")


def test_an_image_that_was_replaced_by_its_copy(refuse: Refuse, orphan: Orphan) -> None:
    with _put_aside(orphan.memory) as aside:
        shutil.copy2(aside, orphan.memory)
        refuse(orphan.journal, f"memory {orphan.memory}: not the image of the journal")


def test_an_image_that_is_something_else_now(refuse: Refuse, orphan: Orphan) -> None:
    for make in (os.mkfifo, os.mkdir):
        with _put_aside(orphan.memory):
            make(orphan.memory)
            refuse(orphan.journal, f"memory {orphan.memory}: not the image of the journal")
            orphan.memory.rmdir() if orphan.memory.is_dir() else orphan.memory.unlink()


def test_an_image_that_was_changed(refuse: Refuse, orphan: Orphan) -> None:
    status = orphan.memory.stat()
    os.utime(orphan.memory, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    refuse(orphan.journal, "or changed since")
    os.truncate(orphan.memory, status.st_size + 1)
    os.utime(orphan.memory, ns=(status.st_atime_ns, status.st_mtime_ns))
    refuse(orphan.journal, "or changed since")
    os.truncate(orphan.memory, status.st_size)
    os.utime(orphan.memory, ns=(status.st_atime_ns, status.st_mtime_ns))


# --- who serves it ---------------------------------------------------------------------------------------


def test_a_vm_that_is_served(make_journalled: MakeJournalled, adopt_pages: Adopt) -> None:
    """Its journal changes all the time, and goes on doing so."""
    world = make_journalled("--no-prefetch")
    locked = f"adopt: journal {world.journal}: locked: another page server is alive on it$"
    adopt_pages(world.vmm.pid, world.journal, ready=False).refused(locked)
    assert world.vmm.verdicts([1]) == ["image"]
    world.server.kill()
    adopter = adopt_pages(world.vmm.pid, world.journal)
    adopt_pages(world.vmm.pid, world.journal, ready=False).refused(locked)
    adopter.stop()  # alive, and that is what counts
    adopt_pages(world.vmm.pid, world.journal, ready=False).refused(locked)
    adopter.send(signal.SIGCONT)
    assert world.vmm.verdicts() == ["image"] * 64
    world.vmm.kill()
    adopter.ends(0)


def test_of_many_at_once_one_goes_on(make_journalled: MakeJournalled, adopt_pages: Adopt) -> None:
    world = make_journalled("--no-prefetch")
    world.server.kill()
    adopters = [adopt_pages(world.vmm.pid, world.journal, ready=False) for _ in range(3)]
    eventually(lambda: sum(adopter.has_ended() for adopter in adopters) == 2, "all but one have ended")
    (winner,) = (adopter for adopter in adopters if not adopter.has_ended())
    for adopter in adopters:
        if adopter is not winner:
            adopter.refused("locked: another page server is alive on it$")
    winner.wait_ready()
    assert world.vmm.verdicts() == ["image"] * 64
    world.vmm.kill()
    winner.ends(0)


def test_a_vmm_that_has_exited_meanwhile(make_journalled: MakeJournalled, adopt_pages: Adopt) -> None:
    world = make_journalled("--no-prefetch")
    world.server.kill()
    world.vmm.kill()
    world.vmm.wait()
    adopt_pages(world.vmm.pid, world.journal, ready=False).refused("does not run$")
    assert world.journal.exists()


def test_without_the_native_core_it_is_refused_with_the_fix(orphan: Orphan) -> None:
    words = [VMD, "pages", "adopt", "--pid", str(orphan.vmm.pid), "--journal", str(orphan.journal)]
    env = {**os.environ, "VMD_CORE": "reference"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, env=env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "vmd: error: pages adopt: needs the native core, not the reference one; build it with `make develop`\n"
    )
    assert orphan.is_untouched()


def test_without_the_right_to_trace_it_it_is_one_line(orphan: Orphan) -> None:
    words = [VMD, "pages", "adopt", "--pid", str(orphan.vmm.pid), "--journal", str(orphan.journal)]
    drop = f"import ctypes, os; ctypes.CDLL(None).prctl(24, 19); os.execv({VMD!r}, {words!r})"  # CAP_SYS_PTRACE
    done = subprocess.run([sys.executable, "-c", drop], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    why = "its userfaultfd: Permission denied (ptrace permission is needed)"
    assert done.stderr == f"vmd: error: adopt: vmm {orphan.vmm.pid}: {why}\n"
    assert orphan.is_untouched()
