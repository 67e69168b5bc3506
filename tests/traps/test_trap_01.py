"""Installs are refused while a removal is under way, and a little longer: no fault may be lost to that."""

from __future__ import annotations

import pytest

from tests.contract.world import MakeImage, Serve
from vmd.pages.contract import Service

pytestmark = pytest.mark.needs_uffd

REMOVERS, ROUNDS = 8, 400
REMOVED, FAULTED, REPLAYED = range(REMOVERS), range(8, 264), range(264, 768)


@pytest.mark.parametrize("replays", [False, True])
def test_faults_are_served_though_removals_never_cease(serve: Serve, make_image: MakeImage, replays: bool) -> None:
    image = make_image(768, holes=range(0, 768, 5))
    served = serve(image, service=image.replay(REPLAYED) if replays else Service())
    removals = served.vmm.start("remove", REMOVED, threads=REMOVERS, rounds=ROUNDS, split=True)
    faults = served.vmm.start("verdict", FAULTED, threads=4)
    assert faults.wait(60) == [image.verdicts(FAULTED)] * 4
    assert removals.wait(60) == [["ok"] * ROUNDS] * REMOVERS
    assert served.at_rest().parked > 0  # the kernel did refuse
    assert served.vmm.verdicts(REMOVED) == ["zero"] * REMOVERS
    assert served.vmm.verdicts(REPLAYED) == image.verdicts(REPLAYED)
