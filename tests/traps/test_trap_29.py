"""Cold pages of a recording are read before their turn has come, not one by one between the installs."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.contract.held import Held
from tests.contract.world import MakeImage, Serve
from tests.fakes.vmm import FakeVmm, eventually
from tests.system.pages_serve.pages import cached_pages, evict
from vmd.pages.handshake import Handshake

pytestmark = pytest.mark.needs_uffd

PLAN = range(64, 4096, 64)
"""Pages far apart: the kernel's own read-ahead does not bring in one for another."""


# The reference core reads each run when it is its turn, beside the fault thread: slow, and obvious.
@pytest.mark.parametrize("core", ["native"], indirect=True)
def test_the_recording_is_read_while_its_first_install_waits(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(4096)
    with ExitStack() as stack:
        held: list[Held] = []

        def hold(vmm: FakeVmm, _: Handshake) -> None:
            evict(image.path)
            assert cached_pages(image.path) == 0
            held.append(stack.enter_context(Held(copy=vmm.regions.address(PLAN[0]))))

        served = serve(image, service=image.replay(PLAN), before=hold)
        held[0].wait("copy")
        eventually(lambda: cached_pages(image.path) >= len(PLAN), "all of it has been read")
        assert cached_pages(image.path) < 2 * len(PLAN)  # and not because the kernel reads ahead
        assert served.vmm.resident() == set()
        held[0].let_go()
    assert served.replayed().replayed == len(PLAN)
    assert served.vmm.verdicts(PLAN) == ["image"] * len(PLAN)
