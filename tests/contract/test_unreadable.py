"""Pages whose bytes cannot be had: named, poisoned, never wrong; the rest of the VM is served on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from errno import EINVAL, ENOMEM

import pytest

from tests.contract.world import MakeImage, Memory, Serve, Served
from tests.fakes.vmm import FakeVmm, eventually
from vmd import limits
from vmd.pages.contract import Beside, EndReason, Injection, Outcome, Service
from vmd.pages.handshake import Handshake
from vmd.pages.regions import HUGE_PAGE

pytestmark = [pytest.mark.needs_uffd, pytest.mark.seed(21)]

FAULTED = "EFAULT"  # what a system call says of memory that is poisoned


@pytest.fixture
def serve_torn(serve: Serve, make_image: MakeImage) -> Callable[..., Served]:
    """Serve an image of 32 pages that loses its second half once it is served."""

    def start(service: Service = Service(), page_size: int = 4096, pages: int = 32) -> Served:  # noqa: B008
        image = make_image(pages, page_size=page_size)
        served = serve(image, service=service)
        os.truncate(image.path, pages // 2 * page_size)
        return served

    return start


def named(served: Served, page: int) -> list[str]:
    """The warnings, once there are any; one of them must name the page in full."""
    lines = eventually(served.core.warnings, "there is a warning")
    address, offset = served.vmm.regions.address(page), served.vmm.regions.offset(page)
    assert any(f"{address:#x}" in line and str(offset) in line for line in lines), lines
    return lines


def test_the_page_is_named_and_the_others_are_served(serve_torn: Callable[..., Served]) -> None:
    served = serve_torn()
    assert served.vmm.do("kernel_read", [20]) == [FAULTED]
    assert len(named(served, 20)) == 1
    assert served.vmm.verdicts(range(16)) == ["image"] * 16
    assert served.at_rest().poisoned == 1


def test_a_touch_from_user_mode_ends_in_sigbus(serve_torn: Callable[..., Served]) -> None:
    served = serve_torn()
    served.vmm.start_last("read", [20])
    assert served.vmm.wait() == -signal.SIGBUS
    served.ends(EndReason.GONE)
    named(served, 20)
    assert served.counters().poisoned == 1


def test_a_file_that_shrank_before_it_was_served_has_no_holes_at_its_end(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(32)

    def tear(vmm: FakeVmm, handshake: Handshake) -> None:
        os.truncate(image.path, 16 * 4096)

    served = serve(image, service=image.replay([20, 3]), before=tear)
    assert served.vmm.do("kernel_read", [20]) == [FAULTED]
    named(served, 20)
    assert served.vmm.verdicts([3]) == ["image"]


@pytest.mark.seed(10)
def test_many_threads_on_each_lost_page(serve_torn: Callable[..., Served]) -> None:
    """A fault that was queued while its page was being poisoned must not be answered with zeros."""
    served = serve_torn(pages=256)
    lost = range(128, 256)
    assert served.vmm.start("kernel_read", lost, threads=12).wait() == [[FAULTED] * 128] * 12
    assert served.at_rest().poisoned == 128
    assert served.vmm.start("remove", lost).wait() == [["ok"] * 128]
    assert served.at_rest().removed == 0  # nothing was there


def test_huge_pages(serve_torn: Callable[..., Served], huge_pages: None) -> None:
    served = serve_torn(page_size=HUGE_PAGE, pages=12)
    assert served.vmm.start("kernel_read", range(6, 12), threads=12).wait() == [[FAULTED] * 6] * 12
    named(served, 7)
    assert served.vmm.verdicts([0, 1]) == ["image", "image"]
    assert served.at_rest().poisoned == 6


@pytest.mark.seed(13)
def test_a_lost_page_that_is_removed_is_zero(serve_torn: Callable[..., Served]) -> None:
    served = serve_torn()
    served.vmm.start("kernel_read", [20], threads=3).wait()
    assert served.vmm.do("remove_then_verdict", [20]) == ["zero"]
    counters = served.at_rest()
    assert (counters.poisoned, counters.removed, counters.zero) == (1, 0, 1)


@pytest.mark.parametrize("beside", [Beside.REPLAY, Beside.SEQUENTIAL])
def test_the_filler_leaves_a_lost_page_to_demand(serve: Serve, make_image: MakeImage, beside: Beside) -> None:
    image = make_image(32)
    memory = Memory(image.path, 32, image.holes, 4096)
    service = Service(beside, memory.offsets([30, 2, 20, 3]), prefetch_bytes_max=1 << 30)
    served = serve(image, service=service, before=lambda vmm, _: os.truncate(image.path, 16 * 4096))
    if beside is Beside.REPLAY:
        assert served.replayed().replayed == 2
        assert served.vmm.resident() == {2, 3}
    else:
        eventually(lambda: len(served.vmm.resident()) == 16, "what there is comes in")
    assert served.counters().poisoned == 0
    assert served.vmm.do("kernel_read", [20]) == [FAULTED]


def test_ten_are_named_and_the_rest_is_a_count(serve_torn: Callable[..., Served]) -> None:
    served = serve_torn()
    assert served.vmm.do("kernel_read", range(16, 32)) == [FAULTED] * 16
    assert served.at_rest().poisoned == 16
    served.vmm.kill()
    served.ends(EndReason.GONE)
    lines = served.core.warnings()
    assert len(lines) == limits.POISON_LINES_MAX + 1
    assert "6" in lines[-1].split()
    assert served.core.warnings() == []


def test_a_refused_poison_is_parked(serve_torn: Callable[..., Served]) -> None:
    served = serve_torn(Service(injections=[Injection("poison", Outcome.LATER, 4)]))
    assert served.vmm.do("kernel_read", [20]) == [FAULTED]
    counters = served.at_rest()
    assert (counters.poisoned, counters.parked) == (1, 1)


@pytest.mark.parametrize("number", [EINVAL, ENOMEM])
def test_without_poison_the_vm_is_killed(serve_torn: Callable[..., Served], number: int) -> None:
    served = serve_torn(Service(injections=[Injection("poison", Outcome.FATAL, errno=number)]))
    served.vmm.start_last("read", [20])
    error = served.fails()
    assert f"{served.vmm.regions.address(20):#x}" in error
    assert str(served.vmm.regions.offset(20)) in error
    assert served.counters().poisoned == 0
