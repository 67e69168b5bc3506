"""Without a recording: the whole memory in order of the file, bounded, demand first; or nothing at all."""

from __future__ import annotations

import time
from errno import ENOMEM

import pytest

from tests.contract.world import WHOLE_BYTES, MakeImage, Serve
from tests.fakes.vmm import Span, eventually
from vmd import limits
from vmd.pages.contract import Beside, Injection, Outcome, Service
from vmd.pages.regions import HUGE_PAGE, SYSTEM_PAGE

pytestmark = pytest.mark.needs_uffd

FOR_EVER = 1 << 30
WHOLE = Service(Beside.SEQUENTIAL, prefetch_bytes_max=WHOLE_BYTES)


@pytest.mark.seed(24, 49)
def test_the_whole_memory_comes_in(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(100, holes=range(30, 50))
    served = serve(image, [Span(40, 60), Span(50, 0)], WHOLE)
    eventually(lambda: len(served.vmm.resident()) == 90, "all is resident")
    assert served.vmm.verdicts() == image.verdicts([*range(60, 100), *range(50)])
    counters = served.at_rest()
    assert (counters.prefetched, counters.zero, counters.faults) == (70, 20, 0)
    assert not counters.replay_done


def test_it_stops_at_its_bound_having_gone_by_the_file(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(40, holes={1})
    bounded = Service(Beside.SEQUENTIAL, prefetch_bytes_max=21 * SYSTEM_PAGE)
    served = serve(image, [Span(20, 20), Span(20, 0)], bounded)
    # Pages are numbered by address; the second region holds the file's beginning.
    eventually(lambda: len(served.vmm.resident()) >= 21, "the bound is reached")
    assert served.vmm.verdicts([39]) == ["image"]  # a round trip, in which more would have come
    assert served.vmm.resident() == {*range(20, 40), 0}
    assert served.at_rest().demand == 0


@pytest.mark.seed(25)
@pytest.mark.parametrize("service", [Service(), Service(Beside.RECORD), Service(Beside.SEQUENTIAL)])
def test_nothing_comes_unasked(serve: Serve, service: Service) -> None:
    served = serve(32, service=service)
    assert served.vmm.verdicts([4, 20]) == ["image", "image"]
    assert served.vmm.resident() == {4, 20}


def test_it_stops_when_memory_is_short(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PREFETCH_MEMORY_FLOOR_PERCENT", 101)
    served = serve(32, service=WHOLE)
    assert served.vmm.verdicts([4]) == ["image"]
    assert served.vmm.resident() == {4}


@pytest.mark.seed(10, 11)
def test_touches_race_the_prefetch(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(1024, holes=range(500, 600))
    served = serve(image, service=WHOLE)
    for results in served.vmm.start("verdict", reversed(range(1024)), threads=3).wait():
        assert results == image.verdicts(reversed(range(1024)))
    counters = served.at_rest()
    assert counters.demand + counters.prefetched == 924
    assert counters.zero == 100


@pytest.mark.seed(55)
def test_huge_pages(serve: Serve, make_image: MakeImage, huge_pages: None) -> None:
    image = make_image(6, holes={2}, page_size=HUGE_PAGE)
    served = serve(image, service=WHOLE)
    eventually(lambda: len(served.vmm.resident()) == 6, "all is resident")
    assert served.vmm.verdicts() == image.verdicts()
    assert served.at_rest().prefetched == 5


@pytest.mark.parametrize("outcome", [Outcome.LATER, Outcome.EDGE])
def test_a_refused_install_does_not_end_it(serve: Serve, make_image: MakeImage, outcome: Outcome) -> None:
    image = make_image(64)
    service = Service(Beside.SEQUENTIAL, prefetch_bytes_max=WHOLE_BYTES, injections=[Injection("copy", outcome)])
    served = serve(image, service=service)
    least = 63 if outcome is Outcome.EDGE else 64
    eventually(lambda: len(served.vmm.resident()) >= least, "it goes on")
    assert served.vmm.verdicts() == image.verdicts()


@pytest.mark.parametrize("outcome", [Outcome.GONE, Outcome.FATAL])
def test_it_may_fail_and_the_vm_is_served_on(serve: Serve, make_image: MakeImage, outcome: Outcome) -> None:
    image = make_image(64, holes={63})  # a hole needs no copy: nothing of the injection can meet it
    orders = [Injection("copy", outcome, FOR_EVER, errno=ENOMEM)]
    served = serve(image, service=Service(Beside.SEQUENTIAL, prefetch_bytes_max=WHOLE_BYTES, injections=orders))
    if outcome is Outcome.FATAL:
        assert "Cannot allocate memory" in eventually(served.core.warnings, "it says why it has ended")[0]
    assert served.vmm.verdicts([63]) == ["zero"]
    assert served.vmm.resident() == {63}


def test_counters_can_be_read_all_the_while(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(2048)
    served = serve(image, service=WHOLE)
    job = served.vmm.start("read", range(2047, 0, -7), threads=2)
    last = served.counters()
    deadline = time.monotonic() + 20
    while last.demand + last.prefetched < 2048:
        assert time.monotonic() < deadline
        now = served.counters()
        for name in ("faults", "demand", "prefetched", "zero", "present", "parked", "cpu_us", "fault_count"):
            assert getattr(now, name) >= getattr(last, name), name
        last = now
    job.wait()
    assert served.at_rest().cpu_us > 0
