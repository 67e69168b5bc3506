"""An install over the end of a mapping is refused whole: that is no sign that the VM has gone, nor that all is lost."""

from __future__ import annotations

import pytest

from tests.contract.world import MakeImage, Serve
from tests.traps.behind import unregister

pytestmark = pytest.mark.needs_uffd

PAGES, SPLIT = 64, 20
OTHERS = [page for page in range(PAGES) if page != SPLIT]


@pytest.mark.parametrize("holes", [range(0), range(PAGES)], ids=["copy", "zero"])
def test_a_region_that_fell_into_two_mappings(serve: Serve, make_image: MakeImage, holes: range) -> None:
    image = make_image(PAGES, holes)
    served = serve(
        image,
        service=image.replay(range(PAGES)),
        before=lambda vmm, handshake: unregister(vmm, handshake, SPLIT),
    )
    served.replayed()
    assert served.vmm.resident() >= set(range(SPLIT + 1, PAGES))  # replay found the other side
    assert served.vmm.verdicts(OTHERS) == image.verdicts(OTHERS)
    assert served.core.warnings() == []
