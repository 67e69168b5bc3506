"""Fetching ahead has to end when memory does; what it leaves undone is demand's, and the VM notices nothing."""

from __future__ import annotations

from errno import ENOMEM

import pytest

from tests.contract.world import WHOLE_BYTES, MakeImage, Serve
from tests.fakes.vmm import eventually
from vmd import limits
from vmd.pages.contract import Beside, Injection, Outcome, Service
from vmd.pages.reference import filler

pytestmark = pytest.mark.needs_uffd

MANY = 10_000
"""Pages: more than are installed between two looks at the host's memory."""


@pytest.mark.parametrize("beside", [Beside.REPLAY, Beside.SEQUENTIAL])
def test_memory_ends_in_the_middle_of_it(serve: Serve, make_image: MakeImage, beside: Beside) -> None:
    image = make_image(256, holes=range(200, 256))
    orders = [Injection("copy", Outcome.FATAL, after=3, errno=ENOMEM)]
    service = Service(beside, image.offsets(range(256)), prefetch_bytes_max=WHOLE_BYTES, injections=orders)
    served = serve(image, service=service)
    (line,) = eventually(served.core.warnings, "it says that it ends")
    assert "demand goes on" in line
    assert "Cannot allocate memory" in line
    assert served.vmm.verdicts() == image.verdicts()
    assert served.at_rest().demand > 0  # the piece that was refused, at least


@pytest.mark.parametrize("core", ["reference"], indirect=True)  # the native one asks the host by itself
def test_the_host_runs_short_in_the_middle_of_it(
    serve: Serve, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = [limits.PREFETCH_MEMORY_FLOOR_PERCENT, limits.PREFETCH_MEMORY_FLOOR_PERCENT - 1]
    monkeypatch.setattr(filler, "memory_available_percent", lambda: looks.pop(0))
    image = make_image(MANY, holes=range(MANY))
    served = serve(image, service=Service(Beside.SEQUENTIAL, prefetch_bytes_max=WHOLE_BYTES))
    eventually(lambda: not looks, "it looked twice")
    assert 0 < served.at_rest().zero < MANY
