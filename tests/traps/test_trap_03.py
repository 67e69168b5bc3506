"""A fault can be read before a removal that came first: nothing is served until the queue is empty."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.contract.held import Held
from tests.contract.world import Serve
from tests.fakes.vmm import FakeVmm, Job, eventually
from vmd.pages.handshake import Handshake

pytestmark = pytest.mark.needs_uffd

CROWD = 70
"""More faults than one read takes, so that the removals stand behind the first read."""
RUN = 32
"""Pages of one removal."""


def test_a_crowd_of_faults_and_then_their_removal(serve: Serve) -> None:
    jobs: list[Job] = []
    with ExitStack() as stack:

        def gather(vmm: FakeVmm, _: Handshake) -> None:
            jobs.append(vmm.start("verdict", range(CROWD), threads=CROWD, split=True))
            eventually(lambda: vmm.blocked() == CROWD, "all faults are queued")
            jobs.append(vmm.start("remove_32_pages", range(0, 3 * RUN, RUN), threads=3, split=True))
            eventually(lambda: vmm.blocked_in("userfaultfd_event_wait") == 3, "the removals stand behind them")
            held.append(stack.enter_context(Held(remove=1)))

        held: list[Held] = []
        served = serve(4 * RUN, before=gather)
        held[0].wait("remove")
        faults, removals = jobs
        assert removals.wait() == [["ok"]] * 3  # from now on the kernel refuses no install
        held[0].let_go()
    assert faults.wait() == [["zero"]] * CROWD
    assert served.vmm.verdicts() == ["zero"] * 3 * RUN + ["image"] * RUN
