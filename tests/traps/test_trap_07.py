"""An install may stop half-way, and says how far it came in a signed number: go on behind it, at the right page."""

from __future__ import annotations

import random

import pytest

from tests.contract.world import MakeImage, Serve
from tests.fakes.vmm import FakeVmm, eventually
from tests.traps.behind import put_asleep
from vmd.pages.contract import EndReason
from vmd.pages.handshake import Handshake

pytestmark = pytest.mark.needs_uffd

PAGES = 64


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("holes", [range(0), range(PAGES)], ids=["copy", "zero"])
def test_a_run_over_pages_that_are_there(serve: Serve, make_image: MakeImage, seed: int, holes: range) -> None:
    image = make_image(PAGES, holes)
    there = {0, PAGES - 1, *random.Random(seed).sample(range(PAGES), PAGES // 4)}

    def put(vmm: FakeVmm, handshake: Handshake) -> None:
        for page in there:
            put_asleep(image, vmm, handshake, page)

    served = serve(image, service=image.replay(range(PAGES)), before=put)
    eventually(lambda: served.counters().replay_done, "the replay is done")
    assert served.vmm.resident() == set(range(PAGES))
    assert served.vmm.verdicts() == image.verdicts()
    assert (served.installed(), served.counters().present) == (PAGES - len(there), len(there))
    assert served.counters().faults == 0
    served.core.stop()
    served.ends(EndReason.STOPPED)
