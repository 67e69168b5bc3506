"""`vmd pages adopt`: a VM whose page server was killed goes on, however often."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import vmd_core

from tests.fakes.vmm import FakeVmm, eventually
from tests.system.pages_serve.command import COUNTS, Adopt, Command, Journalled, MakeJournalled, installed
from tests.system.pages_serve.pages import PAGE, write_log
from tests.system.test_pages_serve_stats import check

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd

MANY = 6


def adds_up(server: Command, vmm: FakeVmm) -> dict[str, Any]:
    """At rest, what is installed by the statistics is what is resident by the page tables: the statistics."""

    def look() -> dict[str, Any] | None:
        stats = server.fresh_stats()
        check(stats)
        at_rest = stats["oldest_unserved_us"] is None and installed(stats) == len(vmm.resident())
        return stats if at_rest else None

    return eventually(look, f"{installed(server.stats())} is {len(vmm.resident())} resident", 5)


def ends_with(server: Command, world: Journalled) -> None:
    """The VMM dies; the server ends well with it, and nothing is left to go on with."""
    world.vmm.kill()
    server.ends(0)
    assert (server.stdout(), server.stderr()) == ("ready\n", "")
    assert server.stats()["state"] == "ended"
    assert not world.journal.exists()


def test_faults_and_removes_that_nobody_answered(make_journalled: MakeJournalled, adopt_pages: Adopt) -> None:
    world = make_journalled("--no-prefetch", holes=[7])
    vmm = world.vmm
    assert vmm.verdicts([3, 4]) == ["image"] * 2
    world.server.stop()
    faults = vmm.start("verdict", [7, 9, 9], threads=3, split=True)
    removal = vmm.start("remove_then_verdict", [3])
    eventually(lambda: (vmm.blocked(), vmm.blocked_in("userfaultfd_remove")) == (3, 1), "all of them wait")
    world.server.kill()
    adopter = adopt_pages(vmm.pid, world.journal)
    assert faults.wait() == [["zero"], ["image"], ["image"]]
    assert removal.wait() == [["zero"]]
    assert adds_up(adopter, vmm)["removed"] == 1
    assert vmm.verdicts() == ["zero" if page in (3, 7) else "image" for page in range(64)]
    adds_up(adopter, vmm)
    ends_with(adopter, world)


def test_killed_and_adopted_again_and_again(make_journalled: MakeJournalled, adopt_pages: Adopt) -> None:
    world = make_journalled("--no-prefetch")
    server: Command = world.server
    vmm, removed = world.vmm, []
    for number in range(MANY):
        assert vmm.verdicts([number, 32 + number]) == ["image"] * 2
        assert vmm.do("remove", [number]) == ["ok"]
        removed.append(number)
        before = adds_up(server, vmm)
        assert (before["demand"], before["removed"]) == (2 * number + 2, number + 1)
        server.kill()
        server = adopt_pages(vmm.pid, world.journal)
        after = server.stats()
        assert [after[key] for key in COUNTS] == [before[key] for key in COUNTS]
        assert after["cpu_us"] >= before["cpu_us"]
        assert adds_up(server, vmm)["demand"] == before["demand"]
    assert vmm.verdicts() == ["zero" if page in removed else "image" for page in range(64)]
    stats = adds_up(server, vmm)
    assert (stats["demand"], stats["zero"], stats["removed"]) == (64, MANY, MANY)
    ends_with(server, world)


def test_it_serves_when_it_says_so_and_its_statistics_go_on(
    make_journalled: MakeJournalled, adopt_pages: Adopt
) -> None:
    world = make_journalled("--no-prefetch")
    assert world.vmm.verdicts(range(20)) == ["image"] * 20
    eventually(lambda: world.server.fresh_stats()["fault_us"]["count"] == 20, "all of them are served")
    before = adds_up(world.server, world.vmm)
    world.server.kill()
    adopter = adopt_pages(world.vmm.pid, world.journal)
    after = adopter.stats()  # of the moment of its `ready`
    check(after)
    changed = {"cpu_us": after["cpu_us"]}
    assert after == {**before, **changed}
    assert (after["state"], after["core"], after["vmm_pid"]) == ("serving", "native", world.vmm.pid)
    assert (after["page_size"], after["guest_bytes"], after["regions"]) == (PAGE, 64 * PAGE, 1)
    assert after["fault_us"]["count"] == 20
    assert world.vmm.verdicts([30]) == ["image"]
    eventually(lambda: adopter.stats()["fault_us"]["count"] == 21, "written again within a moment", 2)
    ends_with(adopter, world)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_leaves_the_vm_frozen_and_another_goes_on(
    make_journalled: MakeJournalled, adopt_pages: Adopt, number: signal.Signals
) -> None:
    world = make_journalled("--no-prefetch")
    world.server.send(number)
    world.server.ends(0)
    first = adopt_pages(world.vmm.pid, world.journal)
    assert world.vmm.verdicts([1]) == ["image"]
    first.send(number)
    assert first.ends(0) < 0.5
    assert first.lines() == [world.frozen_line]
    assert first.stats()["state"] == "ended"
    second = adopt_pages(world.vmm.pid, world.journal)
    assert world.vmm.verdicts() == ["image"] * 64
    assert adds_up(second, world.vmm)["demand"] == 64
    ends_with(second, world)


def left_off(world: Journalled, counter: str) -> None:
    """SIGKILL to the server in the middle of its replay or prefetch."""
    with world.journal.open("rb") as file:
        while vmd_core.read_journal(file.fileno())[counter] == 0:
            assert world.server.process.poll() is None
        world.server.kill()
        left: dict[str, Any] = vmd_core.read_journal(file.fileno())
    assert 0 < left[counter] < 1 << 13
    assert not left["replay_done"]


def test_a_replay_goes_on(make_journalled: MakeJournalled, adopt_pages: Adopt, tmp_path: Path) -> None:
    pages = 1 << 14
    plan = range(1, pages, 2)  # no two of them are one run
    memory = tmp_path / "memory-0"  # the next that the fixture makes
    log = tmp_path / "log"
    write_log(log, (page * PAGE for page in plan))
    world = make_journalled("--replay", log, pages=pages)
    assert world.memory == memory
    left_off(world, "replayed")
    log.unlink()  # the journal has it
    adopter = adopt_pages(world.vmm.pid, world.journal)
    eventually(lambda: adopter.fresh_stats()["replay"]["done"], "the replay is done")
    stats = adds_up(adopter, world.vmm)
    assert stats["replay"] == {"pages": len(plan), "skipped": 0, "done": True, "refused": None}
    assert (stats["replayed"], stats["prefetched"], stats["faults"]) == (len(plan), 0, 0)
    assert world.vmm.resident() == set(plan)
    assert set(world.vmm.do("verdict", range(0, pages, 100))) == {"image"}
    ends_with(adopter, world)


def test_a_prefetch_goes_on_to_its_bound(
    make_journalled: MakeJournalled, adopt_pages: Adopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = 1 << 14
    monkeypatch.setenv("VMD_PREFETCH_MAX_BYTES", str(pages // 2 * PAGE))
    world = make_journalled(pages=pages)
    monkeypatch.delenv("VMD_PREFETCH_MAX_BYTES")  # the journal has it
    left_off(world, "prefetched")
    adopter = adopt_pages(world.vmm.pid, world.journal)
    eventually(lambda: len(world.vmm.resident()) == pages // 2, "all that is to be prefetched is in")
    assert world.vmm.do("verdict", [0, pages - 1]) == ["image"] * 2
    stats = adds_up(adopter, world.vmm)
    assert (stats["prefetched"], stats["demand"]) == (pages // 2, 1)
    ends_with(adopter, world)


def test_without_prefetch_nothing_but_what_is_touched(make_journalled: MakeJournalled, adopt_pages: Adopt) -> None:
    world = make_journalled("--no-prefetch")
    world.server.kill()
    adopter = adopt_pages(world.vmm.pid, world.journal)
    assert world.vmm.verdicts([5, 50]) == ["image"] * 2
    assert world.vmm.resident() == {5, 50}
    ends_with(adopter, world)


def test_it_ends_within_100_ms_of_its_vmm(make_journalled: MakeJournalled, adopt_pages: Adopt) -> None:
    lags = []
    for _ in range(3):  # the host may hold up one of them
        world = make_journalled("--no-prefetch")
        world.server.kill()
        adopter = adopt_pages(world.vmm.pid, world.journal)
        world.vmm.start("read", range(64), rounds=100_000)
        world.vmm.kill()
        world.vmm.wait()
        lags.append(adopter.ends(0))
        assert (adopter.stdout(), adopter.stderr(), world.journal.exists()) == ("ready\n", "", False)
    assert sorted(lags)[1] < 0.1, lags


def test_a_vmm_that_dies_at_any_moment_of_its_adoption(make_journalled: MakeJournalled, adopt_pages: Adopt) -> None:
    dice = random.Random(1)
    for _ in range(4):
        world = make_journalled("--no-prefetch")
        world.server.kill()
        adopter = adopt_pages(world.vmm.pid, world.journal, ready=False)
        time.sleep(dice.uniform(0, 0.3))  # it starts in half of that, or in twice that
        world.vmm.kill()
        world.vmm.wait()
        if adopter.has_ended(20) and adopter.process.wait() == 0:
            assert (adopter.stderr(), world.journal.exists()) == ("", False)
        else:
            adopter.refused(f"its VMM, process {world.vmm.pid}, does not run$")


def test_a_page_that_is_lost_afterwards_is_poisoned_as_ever(
    make_journalled: MakeJournalled, adopt_pages: Adopt
) -> None:
    world = make_journalled("--no-prefetch")
    world.server.kill()
    adopter = adopt_pages(world.vmm.pid, world.journal)
    os.truncate(world.memory, 32 * PAGE)
    assert world.vmm.do("kernel_read", [3, 40]) == ["ok", "EFAULT"]
    world.vmm.kill()
    adopter.ends(1)
    assert f"offset {40 * PAGE}" in adopter.lines()[0]
    assert adopter.lines()[1:] == ["vmd: error: 1 page could not be read from the memory file"]


@pytest.mark.parametrize("what", ["threading.Thread.start", "vmd.pages.native.NativeCore.start"])
def test_one_that_cannot_begin_leaves_all_to_the_next(
    make_journalled: MakeJournalled, adopt_pages: Adopt, what: str
) -> None:
    world = make_journalled("--no-prefetch")
    world.server.kill()
    script = "\n".join(
        [
            "import threading, sys, vmd.cli, vmd.cli.pages, vmd.pages.native",
            'def no(self): raise RuntimeError("no thread")',
            f"{what} = no",
            "sys.exit(vmd.cli.run(sys.argv[1:]))",
        ]
    )
    words = [sys.executable, "-c", script, "pages", "adopt", "--pid", str(world.vmm.pid), "--journal"]
    words.append(str(world.journal))
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")  # it never was ready
    assert done.stderr.startswith("vmd: error: page server: ")
    assert done.stderr.count("\n") == 1
    adopter = adopt_pages(world.vmm.pid, world.journal)
    assert world.vmm.verdicts() == ["image"] * 64
    ends_with(adopter, world)
