"""A guess must never stand before a vCPU: demand is served while the filler waits for a slow page."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.contract.held import Held
from tests.contract.world import Serve, write_image
from tests.fakes.vmm import FakeVmm
from vmd.pages.handshake import Handshake
from vmd.pages.regions import SYSTEM_PAGE

pytestmark = pytest.mark.needs_uffd

PAGES, SLOW = 256, 0
OTHERS = range(1, PAGES)


def test_vcpus_are_served_while_the_filler_waits_for_storage(serve: Serve, run_dir: Path) -> None:
    image = write_image(run_dir / "memory", PAGES, range(9, PAGES, 9), SYSTEM_PAGE)
    with ExitStack() as stack:
        held: list[Held] = []

        def hold(_: FakeVmm, __: Handshake) -> None:
            image.path.unlink()
            held.append(stack.enter_context(Held(pread=SLOW * SYSTEM_PAGE)))

        served = serve(image, service=image.replay([SLOW, *OTHERS]), before=hold)
        held[0].wait("pread")
        vcpus = served.vmm.start("verdict", OTHERS, threads=8)
        assert vcpus.wait() == [image.verdicts(OTHERS)] * 8
        assert served.at_rest().replayed == 0
        held[0].let_go()
    assert served.replayed().replayed == 1
    assert served.vmm.verdicts([SLOW]) == ["image"]
