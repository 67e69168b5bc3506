"""Bytes that were fetched for a page must not go in once the guest has given that page back."""

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

PAGE = 40


def test_a_page_that_is_removed_while_replay_reads_it(serve: Serve, run_dir: Path) -> None:
    image = write_image(run_dir / "memory", 64, {}, SYSTEM_PAGE)  # on a tmpfs each core reads it with pread
    with ExitStack() as stack:
        held: list[Held] = []

        def hold(_: FakeVmm, __: Handshake) -> None:
            image.path.unlink()
            held.append(stack.enter_context(Held(pread=PAGE * SYSTEM_PAGE)))

        served = serve(image, service=image.replay([PAGE]), before=hold)
        held[0].wait("pread")
        assert served.vmm.do("remove", [PAGE]) == ["ok"]
        held[0].let_go()
    assert served.replayed().replayed == 0
    assert served.vmm.resident() == set()
    assert served.vmm.verdicts([PAGE]) == ["zero"]
