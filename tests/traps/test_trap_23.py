"""Waking is no answer: each fault is resolved by an install of the whole page, or the guest asks for ever."""

from __future__ import annotations

import pytest

from tests.contract.world import MakeImage, Serve
from vmd.pages import uffd

pytestmark = pytest.mark.needs_uffd

DATA, HOLE = 0, 1


@pytest.mark.parametrize("features", [uffd.FEATURE_EVENT_REMOVE, 0], ids=["told", "untold"])
def test_one_fault_one_install(serve: Serve, make_image: MakeImage, features: int) -> None:
    image = make_image(4, holes={HOLE})
    served = serve(image, features=features)
    served.racy = not features  # what goes without a word is not counted
    assert served.vmm.verdicts([DATA, HOLE]) == ["image", "zero"]
    for round_ in range(1, 4):
        served.vmm.do("write", [DATA, HOLE])
        served.vmm.do("remove", [DATA, HOLE])
        assert served.vmm.verdicts([DATA, HOLE]) == ["zero", "zero"]
        counters = served.at_rest()
        assert counters.faults == counters.demand + counters.zero == 2 + 2 * round_
        assert counters.present == 0
