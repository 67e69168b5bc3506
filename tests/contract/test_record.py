"""The recorder: which pages were faulted on, in the order in which the faults were read, each once."""

from __future__ import annotations

import random

import pytest

from tests.contract.world import MakeImage, Serve
from tests.fakes.vmm import Span
from vmd.pages.contract import Beside, EndReason, Service

pytestmark = [pytest.mark.needs_uffd, pytest.mark.seed(27)]

RECORD = Service(Beside.RECORD)


def test_first_touch_order_each_once_as_file_offsets(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(40, holes={33})
    served = serve(image, [Span(10, 30), Span(10, 5)], RECORD)
    served.vmm.do("read", [5, 1, 19, 3, 5, 1, 10, 19])  # by address; page 10 is the file's page 5
    assert list(served.core.touched()) == [page * 4096 for page in (35, 31, 14, 33, 5)]
    assert served.at_rest().faults == 5


def test_a_long_order(serve: Serve) -> None:
    served = serve(256, service=RECORD)
    order = random.Random(1).sample(range(256), 200)
    served.vmm.do("read", order)
    assert list(served.core.touched()) == [page * 4096 for page in order]


@pytest.mark.seed(10)
def test_duplicate_faults_are_one_entry(serve: Serve) -> None:
    served = serve(64, service=RECORD)
    served.vmm.start("read", range(64), threads=8).wait()
    touched = list(served.core.touched())
    assert sorted(touched) == [page * 4096 for page in range(64)]


@pytest.mark.seed(13)
def test_a_removed_page_keeps_its_place(serve: Serve) -> None:
    served = serve(8, service=RECORD)
    served.vmm.do("read", [3, 2])
    served.vmm.do("remove_then_verdict", [3])
    assert list(served.core.touched()) == [3 * 4096, 2 * 4096]


def test_it_can_be_read_while_and_after_it_serves(serve: Serve) -> None:
    served = serve(8, service=RECORD)
    assert list(served.core.touched()) == []
    served.vmm.do("read", [7])
    assert list(served.core.touched()) == [7 * 4096]
    served.vmm.do("read", [6])
    served.core.stop()
    served.ends(EndReason.STOPPED)
    assert list(served.core.touched()) == [7 * 4096, 6 * 4096]


def test_nothing_is_recorded_unasked(serve: Serve) -> None:
    served = serve(8)
    served.vmm.do("read", [7])
    assert list(served.core.touched()) == []
