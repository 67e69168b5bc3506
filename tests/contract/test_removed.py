"""A page that the VM gave back reads as zero for ever, whatever else goes on at that moment."""

from __future__ import annotations

from functools import partial

import pytest

from tests.contract.world import WHOLE_BYTES, MakeImage, Serve
from tests.fakes.vmm import FakeVmm, Span, eventually
from vmd.pages import uffd
from vmd.pages.contract import Beside, Service
from vmd.pages.handshake import Handshake
from vmd.pages.regions import HUGE_PAGE

pytestmark = [pytest.mark.needs_uffd, pytest.mark.seed(13)]


def holds(vmm: FakeVmm, pages: set[int]) -> bool:
    return vmm.resident() >= pages


def nobody_waits(vmm: FakeVmm) -> bool:
    return vmm.blocked() == 0


def test_removed_before_it_was_ever_touched(serve: Serve) -> None:
    served = serve(8)
    assert served.vmm.do("remove", [3]) == ["ok"]
    assert served.vmm.resident() == set()
    assert served.vmm.verdicts([3, 4]) == ["zero", "image"]
    counters = served.at_rest()
    assert (counters.removed, counters.zero, counters.demand) == (0, 1, 1)


@pytest.mark.seed(49)
def test_removed_after_it_was_installed_and_again(serve: Serve) -> None:
    served = serve(8)
    for round_ in range(1, 4):
        assert served.vmm.verdicts([3]) == ["image" if round_ == 1 else "zero"]
        served.vmm.do("write", [3])
        assert served.vmm.do("remove", [3]) == ["ok"]
        assert served.vmm.resident() == set()
        assert served.at_rest().removed == round_
    served.vmm.do("remove", [3])  # nothing is there to be removed
    assert served.at_rest().removed == 3
    assert served.vmm.verdicts([3]) == ["zero"]


@pytest.mark.parametrize("when", ["remove", "verdict"])
def test_removed_in_the_middle_of_a_region(serve: Serve, when: str) -> None:
    served = serve(24, [Span(8, 16), Span(8, 0)])
    served.vmm.do(when, [2, 3, 9, 15])
    served.vmm.do("remove", [2, 3, 9, 15])
    gone = {2, 3, 9, 15}
    assert served.vmm.verdicts() == ["zero" if page in gone else "image" for page in range(16)]


def test_one_event_for_many_pages(serve: Serve) -> None:
    served = serve(64)
    served.vmm.verdicts(range(10, 20))
    assert served.vmm.start_at("remove_32_pages", [served.vmm.regions.address(4)]).wait() == [["ok"]]
    assert served.at_rest().removed == 10
    assert served.vmm.verdicts() == ["image"] * 4 + ["zero"] * 32 + ["image"] * 28


def test_replay_does_not_fill_what_is_removed_already(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(16, holes={6})

    def remove_unread(vmm: FakeVmm, _: Handshake) -> None:
        for page in (5, 6):
            vmm.start("remove", [page])
        eventually(lambda: vmm.blocked_in("userfaultfd_event_wait") == 2, "both wait for their events to be read")

    served = serve(image, service=image.replay([1, 5, 6, 7]), before=remove_unread)
    assert served.replayed().replayed == 2
    assert served.vmm.resident() == {1, 7}  # not even zeros
    assert served.vmm.verdicts([5, 6]) == ["zero", "zero"]


@pytest.mark.parametrize("beside", [Beside.REPLAY, Beside.SEQUENTIAL])
def test_removed_while_the_filler_runs(serve: Serve, make_image: MakeImage, beside: Beside) -> None:
    image = make_image(2048, holes=range(0, 2048, 5))
    for seed in range(4):
        service = Service(beside, image.offsets(range(2048)), prefetch_bytes_max=WHOLE_BYTES)
        served = serve(image, service=service)
        gone = set(range(seed, 2048, 16))
        served.vmm.start("remove", gone, threads=3, split=True).wait()
        kept = set(range(2048)) - gone
        eventually(partial(holds, served.vmm, kept), "the rest is in")
        assert served.vmm.resident() == kept
        verdicts = served.vmm.verdicts()
        assert verdicts == ["zero" if page in gone or page in image.holes else "image" for page in range(2048)]


@pytest.mark.seed(12)
@pytest.mark.parametrize("beside", [Beside.NOTHING, Beside.REPLAY])
def test_remove_then_touch_for_many_rounds(serve: Serve, make_image: MakeImage, beside: Beside) -> None:
    image = make_image(256)
    served = serve(image, service=Service(beside, image.offsets(range(0, 256, 2))))
    job = served.vmm.start("remove_then_verdict", range(64), threads=4, rounds=25, split=True)
    others = served.vmm.start("verdict", range(64, 256), threads=2)
    for results in job.wait(60):
        assert results == ["zero"] * 25 * 16
    for results in others.wait():
        assert results == ["image"] * 192


@pytest.mark.seed(12)
def test_a_fault_that_was_read_before_the_remove(serve: Serve) -> None:
    def fault_then_remove(vmm: FakeVmm, _: Handshake) -> None:
        vmm.start("read", [3])
        eventually(lambda: vmm.blocked() == 1, "the fault is queued")
        vmm.start("remove", [3])
        eventually(lambda: vmm.blocked_in("userfaultfd_event_wait") == 1, "the REMOVE is queued behind it")

    for _ in range(5):
        served = serve(8, before=fault_then_remove)
        served.racy = True
        eventually(partial(nobody_waits, served.vmm), "the fault is served")
        assert served.vmm.verdicts([3]) == ["zero"]
        assert served.at_rest().demand == 0


@pytest.mark.seed(12)
def test_faults_race_removes_of_the_same_page(serve: Serve) -> None:
    served = serve(16)
    served.racy = True
    removes = served.vmm.start("remove", range(16), threads=2, rounds=50)
    reads = served.vmm.start("verdict", range(16), threads=2, rounds=50)
    removes.wait(60)
    for results in reads.wait(60):
        seen_zero = set()
        for at, verdict in enumerate(results):
            assert verdict in ("zero", "image")
            assert not (verdict == "image" and at % 16 in seen_zero), "the snapshot's bytes came back"
            if verdict == "zero":
                seen_zero.add(at % 16)
    assert served.vmm.verdicts() == ["zero"] * 16


def test_huge_pages(serve: Serve, make_image: MakeImage, huge_pages: None) -> None:
    image = make_image(6, page_size=HUGE_PAGE)
    served = serve(image, service=image.replay([0, 2]))
    served.replayed()
    assert served.vmm.do("remove", [0, 5]) == ["ok", "ok"]
    assert served.vmm.verdicts() == ["zero", "image", "image", "image", "image", "zero"]
    assert served.at_rest().removed == 1


def test_an_unmapped_page_is_removed(serve: Serve) -> None:
    served = serve(8, features=uffd.FEATURE_EVENT_REMOVE | uffd.FEATURE_EVENT_UNMAP)
    assert served.vmm.verdicts([2, 3]) == ["image", "image"]
    assert served.vmm.do("unmap", [3]) == ["ok"]
    assert served.at_rest().removed == 1
    assert served.vmm.verdicts([2, 4]) == ["image", "image"]


def test_a_page_that_went_without_an_event_is_zero(serve: Serve) -> None:
    served = serve(8, features=0)
    assert served.vmm.do("remove_then_verdict", [2]) == ["image"]  # nobody could know
    assert served.vmm.do("remove_then_verdict", [2]) == ["zero"]  # it was installed: it can only have been removed
    served.racy = True
