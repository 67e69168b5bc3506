"""A core that dies at a named instant, and another that goes on from its journal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from tests.contract.world import MakeImage, Memory, Served, shake_hands
from tests.fakes.vmm import FakeVmm, Span, eventually
from vmd.errors import PagesFailed, VmdError
from vmd.pages.contract import Beside, Death, EndReason, Service
from vmd.pages.cores import core_name
from vmd.pages.journal import Journal
from vmd.pages.native import NativeCore
from vmd.pages.regions import HUGE_PAGE, SYSTEM_PAGE
from vmd.pages.source import Image

pytestmark = pytest.mark.needs_uffd

PAGES, HOLE = 64, 5
DEMAND_POINTS = ["read", "apply", "clear", "intend", "install", "note"]
FILL_POINTS = ["fill-intend", "fill-install", "fill-note"]
ADOPT_POINTS = ["adopt-apply", "adopt-wake", "adopted"]


@dataclass
class Journalled:
    """A fake VMM, and the cores that serve it one after the other from one journal."""

    memory: Memory
    vmm: FakeVmm
    journal: Path
    core: NativeCore
    cores: list[NativeCore] = field(default_factory=list)

    def dies(self) -> None:
        """Wait until the core has died of its order."""
        assert Served(self.memory, self.vmm, self.core).ends(EndReason.DIED)

    def adopt(self, death: Death | None = None) -> Served:
        """Another core goes on."""
        core = NativeCore.adopt(self.journal, self.vmm.pid, Service(death=death))
        assert core is not None
        self.cores.append(core)
        self.core = core
        core.start()
        return Served(self.memory, self.vmm, core)


class Start(Protocol):
    """Starts a VMM that is served, with a journal."""

    def __call__(self, service: Service, page_size: int = ..., pages: int = ...) -> Journalled: ...


@pytest.fixture(params=["native"])  # as all tests of the contract suite say it
def journalled(run_dir: Path, make_image: MakeImage) -> Iterator[Start]:
    """Call it with a `Service` (`Start`)."""
    try:
        core_name("native")
    except VmdError as missing:
        pytest.skip(f"native core not built ({missing})")
    with ExitStack() as stack:

        def start(service: Service, page_size: int = SYSTEM_PAGE, pages: int = PAGES) -> Journalled:
            memory = make_image(pages, {HOLE} & set(range(pages)), page_size)
            vmm = stack.enter_context(FakeVmm(memory.path, [Span(pages, 0)], page_size))
            handshake = shake_hands(vmm, run_dir / "pages.sock", memory)
            image = Image(memory.path)
            journal = Journal.create(run_dir / "journal", image, "native")
            stack.callback(journal.remove)
            core = NativeCore(handshake, image, service, journal)
            journal.close()
            world = Journalled(memory, vmm, journal.path, core, [core])
            stack.callback(lambda: [core.join() for core in world.cores])
            stack.callback(vmm.kill)
            core.start()
            return world

        yield start


def test_points_are_those_of_the_core() -> None:
    source = (Path(__file__).parents[2] / "crates/vmd-core/src/death.rs").read_text()
    assert all(f'("{point}", ' in source for point in DEMAND_POINTS + FILL_POINTS + ADOPT_POINTS)


@pytest.mark.parametrize("point", DEMAND_POINTS)
def test_death_with_a_fault_in_hand(journalled: Start, point: str) -> None:
    world = journalled(Service(death=Death(point)))
    job = world.vmm.start("verdict", [3])
    world.dies()
    served = world.adopt()
    assert job.wait() == [["image"]]
    assert world.vmm.verdicts() == world.memory.verdicts()
    served.finish()


@pytest.mark.parametrize("point", ["read", "apply", "clear"])
def test_death_with_a_removal_in_hand(journalled: Start, point: str) -> None:
    """The event has left the kernel; only the journal's ring still has it."""
    world = journalled(Service(death=Death(point, after=1)))
    assert world.vmm.verdicts([3]) == ["image"]
    job = world.vmm.start("remove", [3, 4])
    world.dies()

    served = world.adopt()
    assert job.wait() == [["ok", "ok"]]
    assert world.vmm.verdicts([2, 3, 4]) == ["image", "zero", "zero"]
    served.finish()


@pytest.mark.parametrize("point", FILL_POINTS)
def test_death_of_a_replay(journalled: Start, point: str) -> None:
    plan = [20, 21, 22, 40, HOLE, 41]
    offsets = Memory.offsets
    world = journalled(
        Service(Beside.REPLAY, offsets(Memory(Path(), PAGES, frozenset(), 4096), plan), death=Death(point))
    )
    world.dies()
    served = world.adopt()
    counters = served.replayed()
    assert world.vmm.resident() == set(plan)
    assert (counters.replayed, counters.zero, counters.takeovers) == (len(plan) - 1, 1, 1)
    assert world.vmm.verdicts() == world.memory.verdicts()
    served.finish()


@pytest.mark.parametrize("point", ADOPT_POINTS)
def test_death_while_adopting(journalled: Start, point: str) -> None:
    world = journalled(Service(death=Death("read", after=1)))
    assert world.vmm.verdicts([3]) == ["image"]
    removal = world.vmm.start("remove", [3])
    world.dies()
    fault = world.vmm.start("verdict", [9])
    world.adopt(Death(point))
    world.dies()
    served = world.adopt()
    assert removal.wait() == [["ok"]]
    assert fault.wait() == [["image"]]
    assert world.vmm.verdicts([3, 4]) == ["zero", "image"]
    assert served.at_rest().takeovers == 2
    served.finish()


@pytest.mark.parametrize("point", DEMAND_POINTS)
def test_death_with_a_page_of_2_mib_in_hand(journalled: Start, huge_pages: None, point: str) -> None:
    world = journalled(Service(death=Death(point, after=2)), HUGE_PAGE, pages=3)
    assert world.vmm.verdicts([1, 2]) == ["image"] * 2
    job = world.vmm.start("verdict", [0])
    world.dies()
    served = world.adopt()
    assert job.wait() == [["image"]]
    assert world.vmm.do("remove", [1]) == ["ok"]
    assert world.vmm.verdicts() == ["image", "zero", "image"]
    counters = served.at_rest()
    assert (counters.demand, counters.zero, counters.removed) == (3, 1, 1)
    served.finish()


def test_a_journal_that_is_served_is_refused(journalled: Start) -> None:
    world = journalled(Service())
    with pytest.raises(PagesFailed, match="locked: another page server is alive on it"):
        NativeCore.adopt(world.journal, world.vmm.pid)
    world.core.stop()
    assert world.core.join().reason is EndReason.STOPPED
    world.adopt().finish()


def test_what_was_removed_stays_removed_however_often_it_is_adopted(journalled: Start) -> None:
    world = journalled(Service())
    assert world.vmm.verdicts([3]) == ["image"]
    world.vmm.do("remove", [3, 7])
    for _ in range(3):
        world.core.kill()
        world.dies()
        served = world.adopt()
    assert world.vmm.verdicts([3, 7, 8]) == ["zero", "zero", "image"]
    counters = served.at_rest()
    assert (counters.demand, counters.zero, counters.removed, counters.takeovers) == (2, 2, 1, 3)
    eventually(lambda: world.vmm.resident() == {3, 7, 8}, "as counted")
    served.finish()
