"""A closed descriptor's number is given to the next VM: nothing of the old one may still use it."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.contract.held import Held
from tests.contract.world import MakeImage, Serve
from tests.fakes.vmm import FakeVmm, eventually
from tests.support.leaks import descriptors
from vmd.pages.contract import EndReason
from vmd.pages.handshake import Handshake

pytestmark = pytest.mark.needs_uffd

PAGE = 3
UFFD = "anon_inode:[userfaultfd]"


def test_a_core_that_has_ended_touches_no_number_again(serve: Serve) -> None:
    numbers: list[int] = []
    first = serve(8, before=lambda _, handshake: numbers.append(handshake.uffd))
    first.vmm.kill()
    first.ends(EndReason.GONE)
    first.vmm.close()
    second = serve(8, before=lambda _, handshake: numbers.append(handshake.uffd))
    assert numbers[0] == numbers[1]
    first.core.stop()
    assert first.core.join().reason is EndReason.GONE
    assert second.vmm.verdicts() == ["image"] * 8
    assert not second.has_ended()


def test_nothing_is_closed_while_an_install_is_under_way(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(8)
    with ExitStack() as stack:
        held: list[Held] = []

        def hold(vmm: FakeVmm, _: Handshake) -> None:
            held.append(stack.enter_context(Held(copy=vmm.regions.address(PAGE))))

        served = serve(image, service=image.replay([PAGE]), before=hold)
        held[0].wait("copy")
        served.core.stop()
        with pytest.raises(AssertionError, match="ended"):
            eventually(served.has_ended, "it ended", 0.5)
        assert descriptors()[UFFD] == 1
        held[0].let_go()
        served.ends(EndReason.STOPPED)
        assert descriptors()[UFFD] == 0
