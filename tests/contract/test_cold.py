"""An image that the page cache does not hold: it is read beside the installs, and every byte is right."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from errno import ENOMEM

import pytest

from tests.contract.held import Held
from tests.contract.world import WHOLE_BYTES, MakeImage, Memory, Serve, Served
from tests.fakes.vmm import FakeVmm, Span, eventually
from vmd.pages.contract import Beside, Injection, Outcome, Service
from vmd.pages.handshake import Handshake

pytestmark = pytest.mark.needs_uffd


def chill(image: Memory) -> Callable[[FakeVmm, Handshake], None]:
    """For ``before``: nothing of the image is in the page cache any more, which the fake VMM has filled."""

    def forget(vmm: FakeVmm, handshake: Handshake) -> None:
        data = next(page for page in range(image.pages) if page not in image.holes)
        fd = os.open(image.path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            with pytest.raises(BlockingIOError):  # else the file system cannot forget, or cannot tell
                os.preadv(fd, [bytearray(1)], data * image.page_size, os.RWF_NOWAIT)
        finally:
            os.close(fd)

    return forget


@pytest.mark.seed(22, 49)
def test_the_recorded_pages_and_no_others(serve: Serve, make_image: MakeImage) -> None:
    order = random.Random(3).sample(range(1024), 300)
    image = make_image(1024, holes=range(0, 1024, 7))
    served = serve(image, service=image.replay(order), before=chill(image))
    counters = served.replayed()
    assert served.vmm.resident() == set(order)
    zeros = len(image.holes & set(order))
    assert (counters.replayed, counters.zero, counters.faults) == (300 - zeros, zeros, 0)
    assert served.vmm.verdicts(order) == image.verdicts(order)


def test_order_is_the_recorded_one(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(64)
    scattered = [40, 3, 17, 9, 60, 1, 33, 22]
    orders = [Injection("copy", Outcome.FATAL, after=5, errno=ENOMEM)]
    served = serve(
        image, service=Service(Beside.REPLAY, image.offsets(scattered), injections=orders), before=chill(image)
    )
    eventually(served.core.warnings, "a warning says that replay has ended")
    assert served.vmm.resident() == set(scattered[:5])
    assert served.vmm.verdicts() == image.verdicts()


@pytest.mark.seed(24)
def test_the_whole_memory_comes_in(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(2048, holes=[*range(0, 2048, 5), *range(600, 900)])
    service = Service(Beside.SEQUENTIAL, prefetch_bytes_max=WHOLE_BYTES)
    served = serve(image, [Span(1024, 1024), Span(1024, 0)], service, before=chill(image))
    eventually(lambda: len(served.vmm.resident()) == 2048, "all is resident")
    assert served.vmm.verdicts() == image.verdicts([*range(1024, 2048), *range(1024)])


@pytest.mark.seed(10, 11)
def test_touches_race_replay(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(1024, holes=range(100, 140))
    order = random.Random(9).sample(range(1024), 1024)
    served = serve(image, service=image.replay(order), before=chill(image))
    touches = order[::-1]
    for results in served.vmm.start("verdict", touches, threads=2).wait():
        assert results == image.verdicts(touches)
    counters = served.replayed()
    assert (counters.demand + counters.replayed, counters.zero) == (984, 40)


@pytest.mark.seed(2)
def test_demand_alone(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(2048, holes=range(0, 2048, 9))
    order = random.Random(4).sample(range(2048), 256)
    served = serve(image, before=chill(image))
    shares = served.vmm.start("verdict", order, threads=8, split=True).wait()
    assert shares == [image.verdicts(order[at::8]) for at in range(8)]
    counters = served.at_rest()
    zeros = len(image.holes & set(order))
    assert (counters.demand, counters.zero, counters.faults, counters.fault_count) == (256 - zeros, zeros, 256, 256)


@pytest.mark.seed(12, 13)
def test_removed_while_storage_is_asked_for_it(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(2048)
    with ExitStack() as stack:
        served, held = serve_held(serve, image, 40, stack)
        fault = served.vmm.start("verdict", [40])
        held.wait("pread")
        removal = served.vmm.start("remove", [40])
        beside = comes_true(removal.results)
        if beside:  # removed, filled with zeros, and removed again before storage answers
            assert fault.wait() == [["zero"]]
            assert served.vmm.do("remove", [40]) == ["ok"]
        held.let_go()
        assert served.vmm.verdicts([1800]) == ["image"]  # asked for after it, from as cold a place
        assert not (beside and comes_true(lambda: 40 in served.vmm.resident()))
        removal.wait()
        assert fault.wait() == [["zero"]]
    assert served.vmm.verdicts([40]) == ["zero"]
    counters = served.at_rest()
    assert (counters.demand, counters.zero) == (1, 2 if beside else 1)


def test_an_answer_that_nobody_waits_for_any_more_costs_nothing(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(64)
    with ExitStack() as stack:
        served, held = serve_held(serve, image, 40, stack)
        fault = served.vmm.start("verdict", [40])
        held.wait("pread")
        removal = served.vmm.start("remove", [40])
        comes_true(removal.results)
        held.let_go()
        fault.wait()
    before = served.at_rest().cpu_us
    time.sleep(0.5)
    assert served.counters().cpu_us - before < 100_000


def serve_held(serve: Serve, image: Memory, page: int, stack: ExitStack) -> tuple[Served, Held]:
    """Serve a cold image; the thread that reads this page of it is held before it does."""
    held: list[Held] = []

    def before(vmm: FakeVmm, handshake: Handshake) -> None:
        chill(image)(vmm, handshake)
        held.append(stack.enter_context(Held(pread=page * image.page_size)))

    return serve(image, before=before), held[0]


def comes_true(look: Callable[[], object]) -> bool:
    """Whether it does within half a second; a core that reads where it serves hears of nothing meanwhile."""
    try:
        return bool(eventually(look, seconds=0.5))
    except AssertionError:
        return False
