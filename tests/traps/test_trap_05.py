"""What a slow worker holds must not be what the reader of the queue needs: the guest's madvise would hang on it."""

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

SLOW = 40


def test_removals_return_while_replay_waits_for_storage(serve: Serve, run_dir: Path) -> None:
    image = write_image(run_dir / "memory", 64, {}, SYSTEM_PAGE)
    with ExitStack() as stack:
        held: list[Held] = []

        def hold(_: FakeVmm, __: Handshake) -> None:
            image.path.unlink()
            held.append(stack.enter_context(Held(pread=SLOW * SYSTEM_PAGE)))

        served = serve(image, service=image.replay([SLOW]), before=hold)
        held[0].wait("pread")
        removals = served.vmm.start("remove", range(SLOW), threads=4, rounds=3)
        assert removals.wait() == [["ok"] * 3 * SLOW] * 4
        held[0].let_go()
    assert served.replayed().replayed == 1
    assert served.vmm.verdicts() == ["zero"] * SLOW + ["image"] * (64 - SLOW)
