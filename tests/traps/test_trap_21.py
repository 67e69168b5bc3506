"""2 MiB pages know no ZEROPAGE and no smaller install, and are counted apart from whatever the default size is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.world import WHOLE_BYTES, MakeImage, Serve
from vmd import template
from vmd.errors import Conflict
from vmd.pages.contract import Beside, Service
from vmd.pages.regions import HUGE_PAGE
from vmd.template import Shape


@pytest.mark.needs_uffd
@pytest.mark.parametrize("beside", [Beside.NOTHING, Beside.REPLAY, Beside.SEQUENTIAL])
def test_zeros_of_every_kind(serve: Serve, make_image: MakeImage, huge_pages: None, beside: Beside) -> None:
    image = make_image(6, holes={0, 3}, page_size=HUGE_PAGE)
    served = serve(image, service=Service(beside, image.offsets([5, 0, 1, 3]), prefetch_bytes_max=WHOLE_BYTES))
    assert served.vmm.verdicts() == image.verdicts()
    for page in (0, 1):  # a hole and a page of data, both written to and given back
        served.vmm.do("write", [page])
        assert served.vmm.do("remove_then_verdict", [page]) == ["zero"]
    counters = served.at_rest()
    assert (counters.removed, counters.zero) == (2, 4)


def test_admission_asks_the_pool_of_that_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = tmp_path / "free_hugepages"
    monkeypatch.setattr(template, "_HUGE_PAGES_FREE", free)
    free.write_text("32\n")
    Shape(64, HUGE_PAGE).check()
    free.write_text("31\n")
    with pytest.raises(Conflict, match="32 are needed, 31 are free"):
        Shape(64, HUGE_PAGE).check()
