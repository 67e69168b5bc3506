"""Every byte that a VM sees is the image's, wherever its regions lie, and counted once."""

from __future__ import annotations

import pytest

from tests.contract.world import MakeImage, Serve
from tests.fakes.vmm import Span
from vmd.pages.regions import HUGE_PAGE

pytestmark = pytest.mark.needs_uffd


@pytest.mark.seed(2, 49)
def test_every_byte_is_the_images(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(64, holes={0, 7, 8, 9, 40, 63})
    served = serve(image)
    assert served.vmm.verdicts() == image.verdicts()
    counters = served.at_rest()
    assert (counters.faults, counters.demand, counters.zero) == (64, 58, 6)
    assert counters.fault_count == 64
    assert 0 < counters.fault_p50_us <= counters.fault_p99_us <= counters.fault_max_us  # type: ignore[operator]
    assert served.core.warnings() == []


@pytest.mark.seed(3)
def test_regions_with_gaps_offsets_and_descending_order(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(40, holes={25})
    served = serve(image, [Span(8, 30), Span(4, 4), Span(6, 20)])  # by address; the file runs the other way
    assert served.vmm.verdicts() == image.verdicts([*range(30, 38), *range(4, 8), *range(20, 26)])


@pytest.mark.seed(3)
def test_first_and_last_byte_of_each_region(serve: Serve) -> None:
    served = serve(16, [Span(4, 8), Span(4, 0)])
    ends = [at for region in served.vmm.regions for at in (region.base, region.end - 8)]
    assert served.vmm.start_at("read", ends).wait() == [["ok"] * 4]
    assert served.vmm.resident() == {0, 3, 4, 7}


@pytest.mark.seed(25)
def test_nothing_but_the_touched_pages_is_installed(serve: Serve) -> None:
    served = serve(64)
    served.vmm.do("read", [3, 33, 4])
    assert served.vmm.resident() == {3, 4, 33}


@pytest.mark.seed(10)
def test_many_threads_on_one_page_need_one_install(serve: Serve) -> None:
    served = serve(8)
    results = served.vmm.start("verdict", range(8), threads=16).wait()
    assert results == [["image"] * 8] * 16
    assert served.at_rest().demand == 8


def test_faults_from_inside_the_kernel(serve: Serve) -> None:
    served = serve(8)
    assert served.vmm.do("kernel_read", [1, 2]) == ["ok", "ok"]
    assert served.vmm.do("kernel_write", [4]) == ["ok"]
    assert served.vmm.do("peek", [4]) == [b"written!".hex()]
    assert served.vmm.verdicts([1, 2, 4]) == ["image", "image", "other"]


def test_a_write_fault_finds_the_rest_of_the_page(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(4, holes={1})
    served = serve(image)
    served.vmm.do("write", [0, 1])
    content = image.path.read_bytes()
    assert served.vmm.do("tail", [0]) == [content[4096 - 8 : 4096].hex()]
    assert served.vmm.do("tail", [1]) == [bytes(8).hex()]


@pytest.mark.seed(2, 55)
def test_huge_pages(serve: Serve, make_image: MakeImage, huge_pages: None) -> None:
    image = make_image(8, holes={2, 5}, page_size=HUGE_PAGE)
    served = serve(image, [Span(3, 5), Span(3, 1)])
    assert served.vmm.verdicts() == image.verdicts([5, 6, 7, 1, 2, 3])
    counters = served.at_rest()
    assert (counters.demand, counters.zero) == (4, 2)


def test_a_huge_page_is_found_from_any_of_its_addresses(serve: Serve, make_image: MakeImage, huge_pages: None) -> None:
    served = serve(make_image(4, page_size=HUGE_PAGE))
    address = served.vmm.regions.address(2)
    served.vmm.start_at("read", [address + HUGE_PAGE - 8, address + 4096]).wait()
    assert served.vmm.resident() == {2}
    assert served.vmm.verdicts([2]) == ["image"]
