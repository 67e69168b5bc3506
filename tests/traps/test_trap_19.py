"""The older key for the page size speaks of KiB and holds bytes; older VMMs send no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.contract.world import MakeImage
from tests.fakes.vmm import FakeVmm, Span
from tests.traps.behind import serving
from vmd.errors import HandshakeRefused
from vmd.pages.handshake import Listener, parse_regions, receive

HUGE = 2 << 20


def parsed(**page_sizes: int) -> int:
    region = {"base_host_virt_addr": 1 << 40, "size": HUGE, "offset": 0, **page_sizes}
    return parse_regions(json.dumps([region]), HUGE).page_size


@pytest.mark.parametrize("size", [4096, HUGE])
def test_its_number_is_taken_as_bytes(size: int) -> None:
    assert parsed(page_size_kib=size) == size
    assert parsed(page_size_kib=1, page_size=size) == size


@pytest.mark.parametrize("size", [0, 1, 4, 64, 2048, 1 << 16, HUGE << 10])
def test_what_is_no_page_size_in_bytes_is_refused(size: int) -> None:
    with pytest.raises(HandshakeRefused, match="page size"):
        parsed(page_size_kib=size)


@pytest.mark.needs_uffd
def test_a_vmm_that_sends_no_other_is_served(core: str, run_dir: Path, make_image: MakeImage) -> None:
    image = make_image(8, holes={3})
    listener = Listener(run_dir / "s")
    with FakeVmm(image.path, [Span(8, 0)]) as vmm:
        regions = vmm.body()
        for region in regions:
            del region["page_size"]
        vmm.handshake(listener.path, regions)
        handshake = receive(listener, image.path.stat().st_size, -1, 5.0, retry=False)
        listener.close()
        assert handshake is not None
        with serving(core, handshake, image):
            assert vmm.verdicts() == image.verdicts()
