"""A run whose install stops half-way: what is in is noted, what is not is installed next."""

from __future__ import annotations

import ctypes

import pytest

from tests.contract.world import WHOLE_BYTES, MakeImage, Memory, Serve, Served
from tests.fakes.vmm import FakeVmm, eventually
from vmd.pages import uffd
from vmd.pages.contract import Beside, EndReason, Outcome, Service
from vmd.pages.handshake import Handshake

pytestmark = [pytest.mark.needs_uffd, pytest.mark.seed(10)]

THERE = (5, 20, 21)
"""Pages that are in before anybody serves, and that no core has installed: a run breaks off at each."""


def put(image: Memory, vmm: FakeVmm, handshake: Handshake) -> None:
    """Install the pages behind the core's back."""
    content = image.path.read_bytes()
    for page in THERE:
        data = content[page * image.page_size : (page + 1) * image.page_size]
        source = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
        size = image.page_size
        install = uffd.copy if any(data) else lambda fd, start, _, size: uffd.zero(fd, start, size)
        assert install(handshake.uffd, vmm.regions.address(page), source, size).outcome is Outcome.DONE


def all_is_in(served: Served, image: Memory) -> None:
    """Every page is resident and right, and those that were there are not counted as installed."""
    eventually(lambda: len(served.vmm.resident()) == image.pages, "all is resident", 5.0)
    eventually(lambda: served.installed() == image.pages - len(THERE), "all that was installed is counted", 5.0)
    assert served.counters().present == len(THERE)
    assert served.vmm.verdicts() == image.verdicts()
    assert served.counters().faults == 0
    served.core.stop()
    served.ends(EndReason.STOPPED)


@pytest.mark.parametrize("beside", [Beside.REPLAY, Beside.SEQUENTIAL])
@pytest.mark.parametrize("holes", [range(0), range(40)], ids=["copy", "zero"])
def test_the_rest_of_the_run_is_installed(serve: Serve, make_image: MakeImage, beside: Beside, holes: range) -> None:
    image = make_image(40, holes)
    service = Service(beside, image.offsets(range(40)), prefetch_bytes_max=WHOLE_BYTES)
    served = serve(image, service=service, before=lambda vmm, handshake: put(image, vmm, handshake))
    all_is_in(served, image)
