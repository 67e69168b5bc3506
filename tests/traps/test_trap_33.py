"""Our own count of the pages proves nothing by itself: two other countings of the kernel must come to the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.contract.world import MakeImage, Serve
from tests.fakes.vmm import FakeVmm
from vmd.pages.regions import HUGE_PAGE, SYSTEM_PAGE

pytestmark = pytest.mark.needs_uffd

REPLAYED, TOUCHED, REMOVED = range(3, 40), range(30, 60), range(33, 50, 4)


def smaps_bytes(vmm: FakeVmm, field: str) -> int:
    """The sum of one field over the mappings that a userfaultfd watches."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{vmm.pid}/smaps").read_text(), flags=re.MULTILINE)
    watched = [text for text in mappings if re.search(r"^VmFlags:.* um\b", text, re.MULTILINE)]
    assert len(watched) == len(vmm.regions)
    return sum(int(re.findall(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[0]) for text in watched) << 10


def test_small_pages(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(64, holes=range(0, 64, 5))
    served = serve(image, service=image.replay(REPLAYED))
    served.replayed()
    served.vmm.do("read", TOUCHED)
    served.vmm.do("remove", REMOVED)
    counters = served.at_rest()
    resident = served.vmm.resident()
    assert resident == {*REPLAYED, *TOUCHED} - {*REMOVED}
    assert counters.demand + counters.replayed + counters.prefetched + counters.zero - counters.removed == len(resident)
    # smaps does not count the page of zeros that all share: what is left are the bytes of the image.
    assert smaps_bytes(served.vmm, "Rss") == len(resident - image.holes) * SYSTEM_PAGE
    assert smaps_bytes(served.vmm, "Private_Hugetlb") == 0


def test_huge_pages_which_no_resident_set_shows(serve: Serve, make_image: MakeImage, huge_pages: None) -> None:
    image = make_image(6, holes={2}, page_size=HUGE_PAGE)
    served = serve(image, service=image.replay([0, 2, 5]))
    served.replayed()
    served.vmm.do("read", [4])
    served.vmm.do("remove", [5])
    served.at_rest()
    assert served.vmm.resident() == {0, 2, 4}
    assert served.installed() == 3
    assert smaps_bytes(served.vmm, "Rss") == 0
    assert smaps_bytes(served.vmm, "Private_Hugetlb") == 3 * HUGE_PAGE  # zeros are copied here
