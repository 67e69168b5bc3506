"""`vmd pages adopt` with a real Firecracker: its page server dies in the middle of a sweep, and no word is wrong."""

from __future__ import annotations

import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import vmd_core

from tests.fakes.vmm import eventually
from tests.guest.vmm import figures
from tests.system.pages_serve.command import Adopt, Command, Serve, installed
from tests.system.pages_serve.machine import Frozen, Jailed, MakeThawed, Thawed
from tests.system.pages_serve.pages import PAGE, log_of, resident_pages, write_log

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = [pytest.mark.needs_kvm, pytest.mark.needs_uffd]

SWEEP = b"sweep pages=8192 seed=5 write=25\n"
KILLS = 4


@pytest.fixture
def journal(run_dir: Path) -> Iterator[Path]:
    """Where a journal goes."""
    path = run_dir / "journal"
    yield path
    path.unlink(missing_ok=True)


def faults(journal: Path) -> int:
    """How many faults its servers have read so far."""
    with journal.open("rb") as file:
        read = vmd_core.read_journal(file.fileno())["faults"]
    assert isinstance(read, int)
    return read


def sweeps(journal: Path, count: int) -> None:
    """Wait until more than so many faults have been read."""
    eventually(lambda: faults(journal) > count, "it sweeps")


def waits_for_a_page(pid: int) -> bool:
    """Whether a thread of this process does."""
    stacks = [task / "stack" for task in Path(f"/proc/{pid}/task").iterdir()]
    return any("handle_userfault" in stack.read_text() for stack in stacks)


def adds_up(server: Command, vmm: Thawed) -> None:
    """At rest, what is installed by the statistics is what is resident by the page tables."""
    eventually(
        lambda: installed(server.fresh_stats()) == len(resident_pages(vmm.pid)),
        f"{installed(server.stats())} is {len(resident_pages(vmm.pid))} resident",
        5,
    )


def ends_with(server: Command, vmm: Thawed, journal: Path) -> None:
    vmm.process.kill()
    server.ends(0)
    assert (server.stdout(), server.stderr()) == ("ready\n", "")
    assert not journal.exists()


@pytest.mark.parametrize("mode", ["demand", "replay", "prefetch"])
def test_killed_in_the_middle_of_a_sweep(
    serve_pages: Serve, adopt_pages: Adopt, frozen: Frozen, make_thawed: MakeThawed, journal: Path, tmp_path: Path,
    mode: str,
) -> None:  # fmt: skip
    log = write_log(tmp_path / "log", range(0, frozen.pages * PAGE, 7 * PAGE), log_of(frozen.memory))
    options: dict[str, list[str | Path]] = {"demand": ["--no-prefetch"], "replay": ["--replay", log], "prefetch": []}
    quarter = str(frozen.pages // 4 * PAGE)  # the guest waits for what is behind it
    first = serve_pages(frozen.memory, "--journal", journal, *options[mode], env={"VMD_PREFETCH_MAX_BYTES": quarter})
    server: Command = first
    vmm = make_thawed()
    vmm.thaw(frozen, first.socket)
    vmm.send(SWEEP)
    for _ in range(KILLS if mode == "demand" else 1):
        sweeps(journal, faults(journal) + 20)
        server.kill()
        eventually(lambda: waits_for_a_page(vmm.pid), "the guest waits")
        with pytest.raises(TimeoutError):  # for as long as nobody serves it
            vmm.line(0.05)
        server = adopt_pages(vmm.pid, journal)
    swept = figures(vmm.line())
    assert (swept["pages"], swept["wrong"]) == (8192, 0)
    assert vmm.is_right()
    adds_up(server, vmm)
    ends_with(server, vmm, journal)


def test_the_line_that_a_server_leaves_is_the_command_that_goes_on(
    serve_pages: Serve, adopt_pages: Adopt, frozen: Frozen, make_thawed: MakeThawed, journal: Path
) -> None:
    server = serve_pages(frozen.memory, "--no-prefetch", "--journal", journal)
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    vmm.send(SWEEP)
    sweeps(journal, 500)
    server.send(signal.SIGTERM)
    server.ends(0)
    line = f"vmd: warning: vmm {vmm.pid} left frozen; vmd pages adopt --pid {vmm.pid} --journal {journal} goes on"
    assert server.lines() == [line]
    words = shlex.split(line.partition("; ")[2].removesuffix(" goes on"))
    assert words[:4] == ["vmd", "pages", "adopt", "--pid"]
    adopter = adopt_pages(int(words[4]), Path(words[6]))
    assert figures(vmm.line())["wrong"] == 0
    ends_with(adopter, vmm, journal)


def test_a_jailed_one(serve_pages: Serve, adopt_pages: Adopt, frozen: Frozen, journal: Path, tmp_path: Path) -> None:
    """It runs as a user of its own, and all that it sees of the page server is a socket in its jail."""
    with ExitStack() as stack:
        vmm = Jailed(tmp_path / "jail", uid=12345, gid=54321)
        stack.enter_context(vmm)
        shutil.copy(frozen.state, vmm.root / "state")
        (vmm.root / "state").chmod(0o644)
        server = serve_pages(
            frozen.memory, "--no-prefetch", "--journal", journal, "--owner", "12345:54321",
            socket=vmm.root / "pages.sock",
        )  # fmt: skip
        vmm.thaw(Frozen(Path("state"), frozen.memory, frozen.pages), Path("pages.sock"))
        vmm.send(SWEEP)
        sweeps(journal, 500)
        server.kill()
        adopter = adopt_pages(vmm.pid, journal)
        assert figures(vmm.line())["wrong"] == 0
        assert vmm.is_right()
        adds_up(adopter, vmm)
        ends_with(adopter, vmm, journal)


def test_a_vmm_that_dies_while_nobody_serves_it(
    serve_pages: Serve, adopt_pages: Adopt, frozen: Frozen, make_thawed: MakeThawed, journal: Path
) -> None:
    server = serve_pages(frozen.memory, "--no-prefetch", "--journal", journal)
    vmm = make_thawed()
    vmm.thaw(frozen, server.socket)
    server.kill()
    vmm.process.kill()
    vmm.process.wait()
    adopt_pages(vmm.pid, journal, ready=False).refused(f"its VMM, process {vmm.pid}, does not run$")
