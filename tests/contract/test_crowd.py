"""Many faults that wait when the reading begins: more than one read takes, none of them forgotten."""

from __future__ import annotations

import pytest

from tests.contract.world import MakeImage, Serve
from tests.fakes.vmm import FakeVmm, Job, eventually
from vmd.pages.handshake import Handshake

pytestmark = pytest.mark.needs_uffd

CROWD = 150


@pytest.mark.seed(10)
def test_all_of_a_crowd_are_served(serve: Serve, make_image: MakeImage) -> None:
    jobs: list[Job] = []

    def gather(vmm: FakeVmm, _: Handshake) -> None:
        jobs.append(vmm.start("verdict", range(CROWD), threads=CROWD, split=True))
        eventually(lambda: vmm.blocked() == CROWD, "each waits for its page")

    image = make_image(CROWD, holes={70})
    served = serve(image, before=gather)
    assert [result for (result,) in jobs[0].wait(5.0)] == image.verdicts()
    counters = served.at_rest()
    assert (counters.faults, counters.demand, counters.zero, counters.present) == (CROWD, CROWD - 1, 1, 0)
    assert counters.fault_count == CROWD
