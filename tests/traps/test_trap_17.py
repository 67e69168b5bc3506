"""A read that finds nothing is normal on a non-blocking descriptor, and one that blocks would be the end of serving."""

from __future__ import annotations

import pytest

from tests.contract.world import MakeImage, Serve
from tests.fakes.vmm import FakeVmm, Job, eventually
from vmd.pages.contract import EndReason
from vmd.pages.handshake import Handshake

pytestmark = pytest.mark.needs_uffd

ONE_READ = 64
"""Messages that both cores ask for at once: so many leave them to ask once more, and nothing is there."""


@pytest.mark.parametrize("blocking", [False, True])
@pytest.mark.parametrize("reads", [1, 2])
def test_the_queue_ends_with_a_full_read(serve: Serve, make_image: MakeImage, blocking: bool, reads: int) -> None:
    crowd = reads * ONE_READ
    jobs: list[Job] = []

    def gather(vmm: FakeVmm, _: Handshake) -> None:
        jobs.append(vmm.start("verdict", range(crowd), threads=crowd, split=True))
        eventually(lambda: vmm.blocked() == crowd, "all wait for their pages")
        vmm.tell("set_blocking", blocking=blocking)

    served = serve(crowd, before=gather)
    assert jobs[0].wait() == [["image"]] * crowd
    assert served.at_rest().faults == crowd
    served.core.stop()
    served.ends(EndReason.STOPPED, 10)
