"""Each fault that was served is one sample of latency, from the reading of it to the page being there."""

from __future__ import annotations

import pytest

from tests.contract.world import Serve
from tests.fakes.vmm import eventually
from vmd.pages.contract import Injection, Outcome, Service

pytestmark = pytest.mark.needs_uffd


def test_a_fault_that_had_to_wait_is_a_sample_and_a_long_one(serve: Serve) -> None:
    served = serve(8, service=Service(injections=[Injection("copy", Outcome.LATER, 40, after=1)]))
    served.vmm.do("read", [1])
    before = served.at_rest()
    assert before.fault_count == 1
    job = served.vmm.start("read", [2])
    eventually(lambda: (served.counters().oldest_unserved_us or 0) > 1_000, "it waits")
    job.wait()
    counters = served.at_rest()
    assert (counters.fault_count, counters.parked) == (2, 1)
    assert counters.fault_max_us is not None
    assert counters.fault_max_us > 1_000
