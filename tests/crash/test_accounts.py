"""What the figures say after a kill in the middle of an install: neither less nor more than there is."""

from __future__ import annotations

import pytest

from tests.crash.conftest import Begin
from tests.fakes.vmm import eventually
from tests.support.journal_file import COUNTERS, INSTALLED

pytestmark = pytest.mark.needs_uffd


@pytest.mark.parametrize("point", ["install", "note"])
def test_no_fault_is_the_oldest_where_nobody_waits(begin: Begin, point: str) -> None:
    world = begin()
    server = world.serve(death=[point, 0])
    assert world.vmm.verdicts([3]) == ["image"]  # it was in, and the thread went on, when the server died
    server.died()
    served = world.adopt()
    eventually(lambda: served.counters().oldest_unserved_us is None, "there is none that is not served", 2)
    assert (served.at_rest().demand, world.vmm.resident()) == (1, {3})
    served.finish()


@pytest.mark.parametrize(
    ("intent", "zero"),
    [
        ({"intent_brought": 0}, 0),  # killed before it was known: a page that is noted was there, it met EEXIST
        ({"intent_brought": 1}, 0),  # it brought none
        ({"intent_brought": 2}, 1),  # it brought one, which is noted and not counted
        ({"intent_brought": 2, "intent_before": 7}, 0),  # and counted
        ({"intent_brought": 3}, 0),  # more than it was about: not believed
        ({"intent_pages": 1 << 60}, 0),
    ],
)
def test_an_install_that_was_under_way(begin: Begin, intent: dict[str, int], zero: int) -> None:
    """Of page 3, which is in: what a server leaves that is killed a moment before or after it is counted."""
    world = begin()
    server = world.serve()
    assert world.vmm.verdicts([3]) == ["image"]
    eventually(lambda: world.file().live["demand"] and not world.file().live["intent_counter"], "it is counted")
    server.kill()
    file = world.file()
    assert file.states[3] == INSTALLED
    file.live |= {"intent_first": 3, "intent_pages": 1, "intent_counter": 1 + COUNTERS.index("zero"), **intent}
    world.journal.write_bytes(file.pack())
    served = world.adopt()
    eventually(lambda: served.counters().takeovers, "it serves")
    assert world.vmm.verdicts([3]) == ["image"]
    counters = served.counters()
    # What is counted and not there is taken for a page that was given back.
    assert (counters.demand, counters.zero, counters.removed) == (1, zero, zero)
    served.finish()
