"""A fault that was put aside must be looked at again by the clock: its VM may never say another word."""

from __future__ import annotations

import pytest

from tests.contract.world import MakeImage, Serve
from vmd.pages.contract import Injection, Outcome, Service

pytestmark = pytest.mark.needs_uffd

DATA, HOLE = 0, 1
REFUSALS = 200


def test_a_fault_is_tried_again_in_a_silent_vm_and_costs_little(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(2, holes={HOLE})
    orders = [Injection("copy", Outcome.LATER, REFUSALS), Injection("zero", Outcome.LATER, REFUSALS)]
    served = serve(image, service=Service(injections=orders))
    jobs = [served.vmm.start("verdict", [page]) for page in (DATA, HOLE)]
    assert [job.wait() for job in jobs] == [[["image"]], [["zero"]]]
    counters = served.at_rest()
    assert (counters.faults, counters.parked) == (2, 2)
    assert counters.fault_max_us is not None
    assert counters.cpu_us < counters.fault_max_us / 2  # it waits between its tries, and ever longer
