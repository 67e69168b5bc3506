"""Whoever fetches ahead must hear that the VM has died, and stop fetching for it."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.contract.held import Held
from tests.contract.world import WHOLE_BYTES, MakeImage, Serve
from tests.fakes.vmm import FakeVmm
from tests.system.pages_serve.pages import cached_pages, evict
from vmd.pages.contract import Beside, EndReason, Service
from vmd.pages.handshake import Handshake

pytestmark = pytest.mark.needs_uffd

PAGES = 1 << 14
READ_AHEAD = PAGES // 2
"""More than is read before the first page is in, by the reader and by the kernel."""


@pytest.mark.parametrize("beside", [Beside.REPLAY, Beside.SEQUENTIAL])
def test_it_dies_before_the_first_page_is_in(serve: Serve, make_image: MakeImage, beside: Beside) -> None:
    image = make_image(PAGES)
    with ExitStack() as stack:
        held: list[Held] = []

        def hold(vmm: FakeVmm, _: Handshake) -> None:
            evict(image.path)
            held.append(stack.enter_context(Held(copy=vmm.regions.address(0))))

        service = Service(beside, image.offsets(range(PAGES)), prefetch_bytes_max=WHOLE_BYTES)
        served = serve(image, service=service, before=hold)
        held[0].wait("copy")
        served.vmm.kill()
        served.vmm.wait()
        held[0].let_go()
        served.ends(EndReason.GONE, 10)
    assert 0 < cached_pages(image.path) < READ_AHEAD
    assert served.core.warnings() == []
