"""A page that is there already is no error, and whoever sleeps on it still has to be woken."""

from __future__ import annotations

import pytest

from tests.contract.world import MakeImage, Serve
from tests.fakes.vmm import FakeVmm, Job, eventually
from tests.traps.behind import put_asleep
from vmd.pages.contract import EndReason, Service
from vmd.pages.handshake import Handshake

pytestmark = pytest.mark.needs_uffd

DATA, HOLE = 5, 6


@pytest.mark.parametrize("page", [DATA, HOLE])
@pytest.mark.parametrize("replays", [False, True])
def test_somebody_installed_it_and_woke_nobody(serve: Serve, make_image: MakeImage, page: int, replays: bool) -> None:
    image = make_image(8, holes={HOLE})
    jobs: list[Job] = []

    def sleep_then_put(vmm: FakeVmm, handshake: Handshake) -> None:
        jobs.append(vmm.start("verdict", [page], threads=3))
        eventually(lambda: vmm.blocked() == 3, "all wait for the page")
        put_asleep(image, vmm, handshake, page)

    served = serve(image, service=image.replay([page]) if replays else Service(), before=sleep_then_put)
    assert jobs[0].wait() == [image.verdicts([page])] * 3
    eventually(lambda: served.counters().oldest_unserved_us is None, "no fault is open")
    assert served.counters().present > 0
    assert served.installed() == 0  # it was not the core's work
    served.core.stop()
    served.ends(EndReason.STOPPED)
