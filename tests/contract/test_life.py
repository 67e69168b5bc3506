"""How serving ends, and that one VM's end is nobody else's."""

from __future__ import annotations

import os
import random
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tests.contract.world import WHOLE_BYTES, MakeImage, Serve, Served, shake_hands
from tests.fakes.vmm import FakeVmm, Span, eventually
from vmd.pages import uffd
from vmd.pages.contract import Beside, EndReason, Injection, Outcome, Service
from vmd.pages.cores import make_core
from vmd.pages.handshake import Handshake
from vmd.pages.source import Image

pytestmark = pytest.mark.needs_uffd

FOR_EVER = 1 << 30
NEVER_SERVED = Service(injections=[Injection("copy", Outcome.LATER, FOR_EVER)])
GONE_SECONDS = 0.1  # interfaces.md, "End"
STOP_SECONDS = 0.5


def gone_after(served: Served) -> float:
    """Seconds from the VMM's death to the end of its core."""
    served.vmm.wait()
    start = time.monotonic()
    served.ends(EndReason.GONE)
    return time.monotonic() - start


@pytest.mark.seed(16)
def test_the_vmm_exits_while_nothing_happens(serve: Serve) -> None:
    served = serve(8)
    served.vmm.verdicts([1])
    served.vmm.kill()
    assert gone_after(served) < GONE_SECONDS
    counters = served.counters()  # readable after the end
    assert (counters.demand, counters.faults) == (1, 1)


@pytest.mark.seed(16)
def test_the_vmm_exits_by_itself(serve: Serve) -> None:
    served = serve(8)
    with pytest.raises(EOFError):
        served.vmm.tell("exit", code=3)
    assert gone_after(served) < GONE_SECONDS


@pytest.mark.seed(16)
@pytest.mark.parametrize("beside", [Beside.NOTHING, Beside.REPLAY, Beside.SEQUENTIAL])
def test_the_vmm_is_killed_at_any_moment(serve: Serve, make_image: MakeImage, beside: Beside) -> None:
    image = make_image(1024, holes=range(0, 1024, 9))
    moments = random.Random(7)
    for _ in range(8):
        service = Service(beside, image.offsets(range(1024)), prefetch_bytes_max=WHOLE_BYTES)
        served = serve(image, service=service)
        served.vmm.start("verdict", moments.sample(range(1024), 1024), threads=3)
        served.vmm.start("remove", moments.sample(range(1024), 100))
        target = moments.randrange(900)
        eventually(partial(has_installed, served, target), f"{target} pages are in")
        served.vmm.kill()
        assert gone_after(served) < GONE_SECONDS


def has_installed(served: Served, pages: int) -> bool:
    return served.installed() >= pages


@pytest.mark.seed(16)
def test_the_vmm_is_killed_while_its_faults_are_parked(serve: Serve) -> None:
    served = serve(8, service=NEVER_SERVED)
    served.vmm.start("read", [1], threads=3)
    eventually(lambda: served.counters().parked >= 1, "a fault is parked")
    served.vmm.kill()
    assert gone_after(served) < GONE_SECONDS


def test_a_vmm_that_was_gone_before_it_was_served(serve: Serve) -> None:
    served = serve(8, before=lambda vmm, _: vmm.close())
    served.ends(EndReason.GONE, GONE_SECONDS)


def test_a_vmm_that_had_no_pidfd_any_more(serve: Serve) -> None:
    def reap(vmm: FakeVmm, handshake: Handshake) -> None:
        vmm.kill()
        vmm.wait()
        os.close(handshake.pidfd)
        handshake.pidfd = -1

    served = serve(8, before=reap)
    served.ends(EndReason.GONE, GONE_SECONDS)


@pytest.mark.seed(7, 17)
def test_stop_while_threads_wait_for_pages(serve: Serve) -> None:
    served = serve(8, service=NEVER_SERVED)
    served.vmm.start("read", [1, 2], threads=2)
    eventually(lambda: served.counters().parked >= 2, "both are parked")
    start = time.monotonic()
    served.core.stop()
    served.core.stop()
    served.ends(EndReason.STOPPED)
    assert time.monotonic() - start < STOP_SECONDS
    assert served.vmm.is_alive()
    assert served.vmm.blocked() == 2  # frozen, not let go on with zeros


@pytest.mark.seed(17)
@pytest.mark.parametrize("beside", [Beside.NOTHING, Beside.REPLAY, Beside.SEQUENTIAL])
def test_stop_at_once(serve: Serve, make_image: MakeImage, beside: Beside) -> None:
    image = make_image(2048)
    served = serve(image, service=Service(beside, image.offsets(range(2048)), prefetch_bytes_max=WHOLE_BYTES))
    start = time.monotonic()
    served.core.stop()
    served.ends(EndReason.STOPPED)
    assert time.monotonic() - start < STOP_SECONDS
    assert served.vmm.is_alive()


def test_stop_from_another_thread_wakes_join(serve: Serve) -> None:
    served = serve(8)
    joined = threading.Thread(target=lambda: served.ends(EndReason.STOPPED))
    joined.start()
    served.core.stop()
    joined.join(10)
    assert not joined.is_alive()
    assert served.core.join() == served.core.join()


def test_a_core_that_never_started_has_stopped(core: str, run_dir: Path, make_image: MakeImage) -> None:
    image = make_image(4)
    with FakeVmm(image.path, [Span(4, 0)]) as vmm:
        handshake = shake_hands(vmm, run_dir / "s", image)
        never = make_core(core, handshake, Image(image.path), Service())
        assert never.join().reason is EndReason.STOPPED
        assert vmm.is_alive()


@pytest.mark.seed(15)
def test_a_fault_outside_all_regions_fails_that_vm_alone(serve: Serve) -> None:
    other = serve(8)
    served = serve(16, [Span(8, 8), Span(8, 0)], announce=[1])
    assert served.vmm.verdicts([8]) == ["image"]
    known, unknown = served.vmm.regions.ordered[1], served.vmm.regions.address(3)
    served.vmm.start_last("read", [3])
    error = served.fails()
    assert f"{unknown:#x}" in error
    assert f"{known.base:#x}-{known.end:#x}" in error
    assert other.vmm.verdicts() == ["image"] * 8


@pytest.mark.seed(14)
def test_unknown_events_are_named_and_ignored(serve: Serve) -> None:
    served = serve(8, features=uffd.FEATURE_EVENT_REMOVE | uffd.FEATURE_EVENT_REMAP)
    assert served.vmm.do("move", [6]) == ["ok"]
    assert served.vmm.do("move", [7]) == ["ok"]
    assert served.vmm.verdicts(range(6)) == ["image"] * 6
    lines = served.core.warnings()
    assert lines
    assert all("event" in line for line in lines)


@pytest.mark.seed(14)
def test_the_userfaultfd_of_a_forked_child_is_closed(serve: Serve) -> None:
    served = serve(8, features=uffd.FEATURE_EVENT_REMOVE | uffd.FEATURE_EVENT_FORK)
    served.vmm.tell("fork")
    assert served.vmm.verdicts() == ["image"] * 8
    lines = served.core.warnings()
    assert all("event" in line.lower() for line in lines)
    assert lines


def test_a_userfaultfd_that_the_vmm_makes_blocking_is_served_on(serve: Serve) -> None:
    served = serve(8)
    for page in (1, 2, 3):
        served.vmm.tell("set_blocking", blocking=True)
        assert served.vmm.verdicts([page]) == ["image"]
    served.core.stop()
    served.ends(EndReason.STOPPED)


@pytest.mark.seed(18)
def test_two_vms_of_one_process_see_their_own_memory(serve: Serve, make_image: MakeImage) -> None:
    images = [make_image(256, holes=range(at, 256, 7)) for at in (1, 3)]
    both = [serve(image, service=image.replay(range(0, 256, 2))) for image in images]
    jobs = [served.vmm.start("verdict", range(256), threads=2) for served in both]
    for image, job in zip(images, jobs, strict=True):
        assert job.wait() == [image.verdicts()] * 2


@pytest.mark.seed(18)
def test_vms_come_and_go_beside_one_that_stays(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(512)
    stays = serve(image)
    for round_ in range(8):
        comes = serve(make_image(16, holes={round_}), service=NEVER_SERVED if round_ % 2 else Service())
        job = comes.vmm.start("read", range(16), threads=2)
        mine = range(round_ * 64, round_ * 64 + 64)
        assert stays.vmm.verdicts(mine) == ["image"] * 64
        if round_ % 2 == 0:
            job.wait()
        comes.vmm.kill()
        comes.ends(EndReason.GONE)
    assert stays.at_rest().demand == 512
