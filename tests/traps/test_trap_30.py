"""Only a run that was meant to be recorded is learnt from: a replayed one, or a look at a sandbox, teaches nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.contract.world import WHOLE_BYTES, MakeImage, Serve
from tests.system.conftest import Run
from vmd.backend import Request
from vmd.pages.contract import Beside, Service
from vmd.restore import restore
from vmd.settings import Settings
from vmd.tasks import finish
from vmd.template import Template


@pytest.mark.needs_uffd
@pytest.mark.parametrize("beside", [Beside.NOTHING, Beside.REPLAY, Beside.SEQUENTIAL])
def test_what_is_not_recorded_leaves_no_trace(serve: Serve, make_image: MakeImage, beside: Beside) -> None:
    image = make_image(64)
    served = serve(image, service=Service(beside, image.offsets([7, 3, 8]), prefetch_bytes_max=WHOLE_BYTES))
    assert served.vmm.verdicts([50, 3, 51]) == ["image"] * 3
    assert list(served.core.touched()) == []


@pytest.mark.needs_uffd
def test_what_is_recorded_is_demand_alone(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(64)
    served = serve(image, service=Service(Beside.RECORD, image.offsets([7, 3, 8]), prefetch_bytes_max=WHOLE_BYTES))
    served.vmm.do("read", [50, 3])
    assert served.vmm.resident() == {50, 3}
    assert list(served.core.touched()) == [50 * 4096, 3 * 4096]


@pytest.mark.needs_kvm
@pytest.mark.needs_uffd
def test_the_recording_of_a_template_outlives_any_use(
    template: Template, request_for: Callable[..., Request], settings: Settings, run: Run
) -> None:
    before = template.access_log.read_bytes()

    async def use() -> None:
        restored = await restore(request_for("uffd"), settings)
        try:
            assert "wrong=0" in await restored.ask("check", 60)  # touches far more than was recorded
        finally:
            await finish(restored.close())

    run(use())
    assert template.access_log.read_bytes() == before
