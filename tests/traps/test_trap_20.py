"""What follows in the file may lie below in memory, and the other way round: no run may be joined across that."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tests.contract.world import WHOLE_BYTES, MakeImage, Serve
from tests.fakes.vmm import Span, eventually
from vmd.pages.contract import Beside, Service

pytestmark = pytest.mark.needs_uffd

PAGES, BEHIND = 96, 32
"""Pages in the regions, and behind them in the file, so that what is read too far is there to be read."""


def layout(seed: int) -> list[Span]:
    """The file cut at random into regions; by address they stand backwards, or shuffled."""
    chance = random.Random(seed)
    cuts = sorted({0, PAGES, *chance.sample(range(1, PAGES), 9)})
    spans = [Span(end - start, start) for start, end in pairwise(cuts)]
    if seed == 0:
        return spans[::-1]
    chance.shuffle(spans)
    return spans


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("beside", "by_address"), [(Beside.SEQUENTIAL, False), (Beside.REPLAY, False), (Beside.REPLAY, True)]
)
def test_all_of_it_in_order(serve: Serve, make_image: MakeImage, seed: int, beside: Beside, by_address: bool) -> None:
    image = make_image(PAGES + BEHIND, holes=random.Random(seed).sample(range(PAGES), 6))
    spans = layout(seed)
    addressed = [at for pages, start in spans for at in range(start, start + pages)]
    plan = image.offsets(addressed if by_address else range(PAGES))
    served = serve(image, spans, Service(beside, plan, prefetch_bytes_max=WHOLE_BYTES))
    eventually(lambda: len(served.vmm.resident()) == PAGES, "all is in")
    assert served.vmm.verdicts() == image.verdicts(addressed)
    assert served.at_rest().faults == 0
