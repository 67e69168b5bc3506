"""Replay: the recorded pages, in recorded order, and nothing else; never over what the VM did meanwhile."""

from __future__ import annotations

import itertools
import random
from errno import ENOMEM

import pytest

from tests.contract.world import MakeImage, Serve
from tests.fakes.vmm import Span, eventually
from vmd.pages.contract import Beside, Injection, Outcome, Service
from vmd.pages.regions import HUGE_PAGE

pytestmark = pytest.mark.needs_uffd

SCATTERED = [40, 3, 17, 9, 60, 1, 33, 22]  # no two are neighbours


def stop_after(copies: int) -> Injection:
    """Ends the filler, and nothing else, once so many copies are in."""
    return Injection("copy", Outcome.FATAL, after=copies, errno=ENOMEM)


@pytest.mark.seed(22, 49)
def test_the_recorded_pages_and_no_others(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(64, holes={9})
    served = serve(image, service=image.replay([*SCATTERED, 41, 42, 43]))
    counters = served.replayed()
    assert served.vmm.resident() == {*SCATTERED, 41, 42, 43}
    assert (counters.replayed, counters.zero, counters.demand, counters.faults) == (10, 1, 0, 0)
    assert counters.replay_pages == 11
    assert served.vmm.verdicts() == image.verdicts()


@pytest.mark.seed(22)
@pytest.mark.parametrize("copies", [0, 1, 3, 7])
def test_order_is_the_recorded_one(serve: Serve, make_image: MakeImage, copies: int) -> None:
    image = make_image(64)
    plan = Service(Beside.REPLAY, image.offsets(SCATTERED), injections=[stop_after(copies)])
    served = serve(image, service=plan)
    lines = eventually(served.core.warnings, "a warning says that replay has ended")
    assert "replay" in lines[0]
    assert served.vmm.resident() == set(SCATTERED[:copies])
    assert not served.counters().replay_done
    assert served.vmm.verdicts() == image.verdicts()  # demand goes on


def test_neighbours_in_the_list_are_one_install(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(32)
    plan = Service(Beside.REPLAY, image.offsets([8, 9, 10, 11, 2, 20, 21]), injections=[stop_after(2)])
    served = serve(image, service=plan)
    eventually(served.core.warnings, "replay has ended")
    assert served.vmm.resident() == {8, 9, 10, 11, 2}


def test_runs_end_at_the_end_of_a_region(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(32)
    served = serve(image, [Span(8, 8), Span(8, 0), Span(8, 16)], service=image.replay(range(32)))
    assert served.replayed().replayed == 24
    assert served.vmm.verdicts() == ["image"] * 24
    assert served.counters().faults == 0


def test_offsets_outside_all_regions_are_skipped(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(32)
    plan = image.offsets([0, 10, 15, 16, 31])
    plan.append(1 << 40)
    served = serve(image, [Span(8, 8)], service=Service(Beside.REPLAY, plan))
    counters = served.replayed()
    assert (counters.replay_pages, counters.replayed) == (2, 2)
    assert served.vmm.resident() == {2, 7}


def test_an_empty_plan_is_done(serve: Serve) -> None:
    served = serve(4, service=Service(Beside.REPLAY))
    assert served.replayed().replay_pages == 0
    assert served.vmm.verdicts() == ["image"] * 4


@pytest.mark.seed(10, 11)
def test_touches_race_replay(serve: Serve, make_image: MakeImage) -> None:
    for seed in range(5):
        image = make_image(512, holes=range(100, 140))
        order = random.Random(seed).sample(range(512), 512)
        served = serve(image, service=image.replay(order))
        jobs = [served.vmm.start("verdict", pages, threads=2) for pages in (order, order[::-1])]
        for job in jobs:
            for results in job.wait():
                assert sorted(set(results)) == ["image", "zero"]
                assert results.count("zero") == 40
        counters = served.replayed()
        assert counters.demand + counters.replayed == 472
        assert counters.zero == 40


@pytest.mark.seed(26)
def test_demand_is_served_before_the_plan_is_through(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(8192)
    served = serve(
        image, service=image.replay(range(8191)), before=lambda vmm, _: vmm.start("read", [8191]) and vmm.blocked()
    )
    eventually(lambda: served.counters().demand, "the demand fault is served")
    assert served.counters().replayed < 8191
    assert served.replayed().demand == 1


@pytest.mark.seed(55)
def test_huge_pages_are_replayed_in_order(serve: Serve, make_image: MakeImage, huge_pages: None) -> None:
    image = make_image(6, holes={4}, page_size=HUGE_PAGE)
    served = serve(image, service=image.replay([5, 1, 4]))
    counters = served.replayed()
    assert (counters.replayed, counters.zero) == (2, 1)
    assert served.vmm.resident() == {1, 4, 5}
    assert served.vmm.verdicts() == image.verdicts()


@pytest.mark.parametrize("op", ["copy", "zero"])
def test_a_refused_install_is_tried_again(serve: Serve, make_image: MakeImage, op: str) -> None:
    image = make_image(8, holes={2})
    orders = [Injection(op, Outcome.LATER, count=3)]  # type: ignore[arg-type]
    served = serve(image, service=Service(Beside.REPLAY, image.offsets([2, 5]), injections=orders))
    counters = served.replayed()
    assert (counters.replayed, counters.zero) == (1, 1)
    assert served.vmm.verdicts() == image.verdicts()


@pytest.mark.seed(12)
def test_a_page_that_stays_refused_is_left_to_demand(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(8)
    orders = [Injection("copy", Outcome.LATER, count=100)]
    served = serve(image, service=Service(Beside.REPLAY, image.offsets([5]), injections=orders))
    assert served.replayed().replayed == 0
    assert served.vmm.resident() == set()
    assert served.vmm.verdicts([5]) == ["image"]
    counters = served.at_rest()
    assert (counters.demand, counters.parked) == (1, 1)


def test_a_page_that_has_no_memory_is_left_to_demand(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(8)
    service = Service(Beside.REPLAY, image.offsets([2, 5]), injections=[Injection("copy", Outcome.EDGE)])
    served = serve(image, service=service)
    assert served.replayed().replayed == 1
    assert served.vmm.verdicts() == image.verdicts()


@pytest.mark.parametrize("outcome", [Outcome.GONE, Outcome.FATAL])
def test_it_may_fail_and_the_vm_is_served_on(serve: Serve, make_image: MakeImage, outcome: Outcome) -> None:
    image = make_image(8, holes={4})  # a hole needs no copy: nothing of the injection can meet it
    orders = [Injection("copy", outcome, 1 << 30, errno=ENOMEM)]
    served = serve(image, service=Service(Beside.REPLAY, image.offsets([2, 5]), injections=orders))
    if outcome is Outcome.FATAL:
        assert "Cannot allocate memory" in eventually(served.core.warnings, "it says why it has ended")[0]
    assert served.vmm.verdicts([4]) == ["zero"]
    assert served.vmm.resident() == {4}
    assert not served.counters().replay_done


def test_a_present_page_is_not_counted_and_its_waiters_are_woken(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(8)
    orders = [Injection("copy", Outcome.PRESENT)]
    served = serve(image, service=Service(Beside.REPLAY, image.offsets([2, 5]), injections=orders))
    counters = served.replayed()
    assert (counters.replayed, counters.present) == (1, 1)
    assert served.vmm.verdicts([5]) == ["image"]


def test_sequence_of_states_of_a_page_under_replay(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(4)
    served = serve(image, service=image.replay([1]))
    served.replayed()
    seen = list(
        itertools.chain(*(served.vmm.do(what, [1]) for what in ("verdict", "remove", "verdict", "write", "verdict")))
    )
    assert seen == ["image", "ok", "zero", "ok", "other"]
