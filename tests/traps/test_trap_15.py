"""A bad sector under a mapping is a SIGBUS for its reader: one sick image must not end the server of other VMs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.contract.world import WHOLE_BYTES, MakeImage, Serve
from vmd.pages.contract import Beside, Service

pytestmark = pytest.mark.needs_uffd


@pytest.mark.parametrize("beside", [Beside.NOTHING, Beside.SEQUENTIAL])
def test_an_image_that_cannot_be_read_hurts_its_own_vm_only(
    serve: Serve, make_image: MakeImage, beside: Beside
) -> None:
    sick_image, image = make_image(64), make_image(64, holes={9})
    service = Service(beside, prefetch_bytes_max=WHOLE_BYTES)
    sick = serve(sick_image, service=service, before=lambda *_: os.truncate(sick_image.path, 0))
    other = serve(image, service=service)
    assert sick.vmm.do("kernel_read", [0, 40, 63]) == ["EFAULT"] * 3
    assert other.vmm.verdicts() == image.verdicts()
    assert sick.at_rest().poisoned == 3
    mapped = Path("/proc/self/maps").read_text()
    assert str(image.path) not in mapped
    assert str(sick_image.path) not in mapped
