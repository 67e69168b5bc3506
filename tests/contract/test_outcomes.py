"""Each outcome of an install for a page that is waited for; none of them leaves a waiter behind."""

from __future__ import annotations

import time
from errno import ENOMEM

import pytest

from tests.contract.world import MakeImage, Serve
from tests.fakes.vmm import eventually
from vmd import limits
from vmd.pages.contract import EndReason, Injection, Outcome, Service
from vmd.pages.regions import HUGE_PAGE

pytestmark = pytest.mark.needs_uffd

FOR_EVER = 1 << 30
DATA, HOLE = 1, 2


def injected(op: str, outcome: Outcome, count: int = 1, number: int = 0) -> Service:
    return Service(injections=[Injection(op, outcome, count, errno=number)])  # type: ignore[arg-type]


@pytest.fixture(params=[("copy", DATA), ("zero", HOLE)], ids=["copy", "zero"])
def op_and_page(request: pytest.FixtureRequest) -> tuple[str, int]:
    """A kind of install, and the page that needs it."""
    pair: tuple[str, int] = request.param
    return pair


@pytest.mark.seed(12)
def test_a_refused_fault_waits_and_is_served(serve: Serve, make_image: MakeImage, op_and_page: tuple[str, int]) -> None:
    op, page = op_and_page
    image = make_image(4, holes={HOLE})
    served = serve(image, service=injected(op, Outcome.LATER, 5))
    assert served.vmm.verdicts([page]) == image.verdicts([page])
    counters = served.at_rest()
    assert counters.demand + counters.zero == 1
    assert counters.parked == 1


@pytest.mark.seed(10, 12)
def test_many_faults_on_a_refused_page(serve: Serve) -> None:
    served = serve(4, service=injected("copy", Outcome.LATER, 20))
    assert served.vmm.start("verdict", [DATA], threads=8).wait() == [["image"]] * 8
    counters = served.at_rest()
    assert counters.demand == 1
    assert 1 <= counters.parked <= counters.faults <= 8


@pytest.mark.seed(10)
def test_a_page_that_is_there_is_woken(serve: Serve, make_image: MakeImage, op_and_page: tuple[str, int]) -> None:
    op, page = op_and_page
    image = make_image(4, holes={HOLE})
    served = serve(image, service=injected(op, Outcome.PRESENT))
    # It was not there, the injection lied: so its waiter comes back, and a page that is noted as
    # installed and yet missing can only have been removed.
    assert served.vmm.verdicts([page]) == ["zero"]
    counters = served.at_rest()
    assert (counters.present, counters.demand, counters.zero, counters.faults) == (1, 0, 1, 2)


def test_a_parked_fault_shows_in_the_gauge_and_does_not_hold_up_others(serve: Serve) -> None:
    served = serve(64, service=Service(injections=[Injection("copy", Outcome.LATER, FOR_EVER, after=1)]))
    assert served.vmm.verdicts([0]) == ["image"]
    served.vmm.start("read", [5])
    eventually(lambda: (served.counters().oldest_unserved_us or 0) > 50_000, "the gauge rises")
    assert served.counters().parked == 1
    assert served.vmm.do("remove_then_verdict", [0]) == ["zero"]
    served.core.stop()
    served.ends(EndReason.STOPPED)


@pytest.mark.seed(12)
def test_a_fault_that_waits_too_long_fails_the_vm(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FAULT_UNSERVED_SECONDS_MAX", 0.2)
    served = serve(4, service=injected("copy", Outcome.LATER, FOR_EVER))
    address = served.vmm.regions.address(DATA)
    start = time.monotonic()
    served.vmm.start_last("read", [DATA])
    error = served.fails()
    assert time.monotonic() - start >= 0.2
    assert f"{address:#x}" in error
    assert "absent" in error.lower()


def test_memory_that_is_not_registered_fails_the_vm(
    serve: Serve, make_image: MakeImage, op_and_page: tuple[str, int]
) -> None:
    op, page = op_and_page
    served = serve(make_image(4, holes={HOLE}), service=injected(op, Outcome.EDGE))
    served.vmm.start_last("read", [page])
    assert f"{served.vmm.regions.address(page):#x}" in served.fails()


def test_an_address_space_that_went_without_its_process_fails_the_vm(
    serve: Serve, make_image: MakeImage, op_and_page: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "VMM_EXIT_SECONDS", 0.5)
    op, page = op_and_page
    served = serve(make_image(4, holes={HOLE}), service=injected(op, Outcome.GONE))
    served.vmm.start_last("read", [page])
    assert "memory" in served.fails()


def test_any_other_errno_fails_the_vm_and_is_named(
    serve: Serve, make_image: MakeImage, op_and_page: tuple[str, int]
) -> None:
    op, page = op_and_page
    served = serve(make_image(4, holes={HOLE}), service=injected(op, Outcome.FATAL, number=ENOMEM))
    served.vmm.start_last("read", [page])
    error = served.fails()
    assert "Cannot allocate memory" in error
    assert f"{served.vmm.regions.address(page):#x}" in error


@pytest.mark.seed(16)
def test_a_dying_vmm_is_gone_and_not_failed(serve: Serve) -> None:
    # The address space goes before the process does: the pidfd has the last word.
    orders = [Injection("copy", Outcome.LATER, 3), Injection("copy", Outcome.GONE)]
    served = serve(4, service=Service(injections=orders))
    served.vmm.start("read", [DATA])
    served.vmm.kill()
    assert served.ends(EndReason.GONE).error is None


def test_huge_pages_are_parked_too(serve: Serve, make_image: MakeImage, huge_pages: None) -> None:
    image = make_image(3, holes={HOLE}, page_size=HUGE_PAGE)
    served = serve(image, service=injected("copy", Outcome.LATER, 3))
    assert served.vmm.verdicts() == image.verdicts()
    assert served.at_rest().parked == 1
