"""No REMOVE comes between the filler's look at a page and its install, nor an install between its reading and its note.

Where the two overlap is a matter of nanoseconds, so threads are held there: what must not happen
gets all the time that it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.contract.held import Held
from tests.contract.world import MakeImage, Memory, Serve, Served
from tests.fakes.vmm import FakeVmm, Job, eventually
from vmd.pages.contract import Service
from vmd.pages.handshake import Handshake

pytestmark = [pytest.mark.needs_uffd, pytest.mark.seed(11, 13)]

PAGE = 200
"""The page in question; no neighbour of another one in the plan."""
NEVER_SECONDS = 0.5
"""What has not happened by then does not happen; a core that does it needs microseconds."""


class Scene:
    """A VM whose core is held from its first thread on."""

    def __init__(
        self,
        serve: Serve,
        image: Memory,
        service: Service,
        stack: ExitStack,
        *stops: str,
        first: Callable[[FakeVmm], None] = lambda _: None,
    ) -> None:
        self.removal: Job | None = None
        self._removes_first = "remove" in stops

        def before(vmm: FakeVmm, _: Handshake) -> None:
            first(vmm)
            address = vmm.regions.address(PAGE)
            self.held = stack.enter_context(Held(**dict.fromkeys(stops, address)))
            if self._removes_first:
                self.remove(vmm)

        self.served: Served = serve(image, service=service, before=before)

    def remove(self, vmm: FakeVmm) -> None:
        """Remove the page: the event is in the queue, or has been read already."""
        job = self.removal = vmm.start("remove", [PAGE])
        eventually(
            lambda: vmm.blocked_in("userfaultfd_event_wait") or job.results(), "the REMOVE is queued or read already"
        )

    def removed(self, seconds: float) -> bool:
        """Whether the VM's removal returns within so many seconds."""
        assert self.removal is not None
        try:
            return bool(self.removal.wait(seconds))
        except AssertionError:
            return False


def test_no_remove_is_read_between_the_fillers_look_and_its_install(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(256)
    with ExitStack() as stack:
        scene = Scene(serve, image, image.replay([PAGE]), stack, "copy")
        scene.held.wait("copy")  # it has seen that the page is absent
        scene.remove(scene.served.vmm)
        scene.removed(NEVER_SECONDS)  # it may not return; if it does, what is installed now is stale
        scene.held.let_go()
        assert scene.removed(20)
    scene.served.replayed()
    assert scene.served.vmm.verdicts([PAGE]) == ["zero"]


def test_nothing_is_installed_between_the_reading_of_a_remove_and_its_note(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(256)
    # Until the REMOVE is read all installs are refused, each page for several ms: the filler has
    # not come to the page in question by then.
    plan = image.replay([*range(0, PAGE - 1, 2), PAGE])
    with ExitStack() as stack:
        scene = Scene(serve, image, plan, stack, "remove", "copy")
        scene.held.wait("remove")
        assert scene.removed(20)  # for the VM the page is gone, whatever the reader does next
        scene.held.has_come("copy", NEVER_SECONDS)
        scene.held.let_go()
    scene.served.replayed()
    assert scene.served.vmm.verdicts([PAGE]) == ["zero"]


@pytest.mark.seed(12)
def test_no_fault_is_served_before_the_remove_that_was_read_with_it(serve: Serve, make_image: MakeImage) -> None:
    image = make_image(256)
    with ExitStack() as stack:
        faults: list[Job] = []

        def fault(vmm: FakeVmm) -> None:
            faults.append(vmm.start("verdict", [PAGE]))
            eventually(lambda: vmm.blocked() == 1, "the fault is queued")

        scene = Scene(serve, image, Service(), stack, "remove", first=fault)
        scene.held.wait("remove")  # with the fault, which stands before it
        assert scene.removed(20)  # what is installed now stays, and must not be the image's
        scene.held.let_go()
    assert faults[0].wait() == [["zero"]]
    assert scene.served.vmm.verdicts([PAGE]) == ["zero"]
