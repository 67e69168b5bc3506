"""One read that fails is no reason to lose a page, let alone a VM: it is tried again, and then the bytes are right."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.contract.world import MakeImage, shake_hands
from tests.fakes.vmm import FakeVmm, Span, eventually
from tests.system.pages_serve.storage import SilentStorage
from tests.traps.behind import serving
from vmd import limits

pytestmark = pytest.mark.needs_uffd


def test_storage_that_fails_all_tries_but_the_last(core: str, run_dir: Path, make_image: MakeImage) -> None:
    assert limits.IMAGE_READ_TRIES > 1
    image = make_image(8)
    with ExitStack() as stack:
        vmm = stack.enter_context(FakeVmm(image.path, [Span(8, 0)]))
        handshake = shake_hands(vmm, run_dir / "s", image)
        storage = stack.enter_context(SilentStorage(image.path))
        served = stack.enter_context(serving(core, handshake, image))
        stack.callback(storage.close)  # before the core is joined: it may be waiting for an answer
        fault = vmm.start("verdict", [3])
        for _ in range(limits.IMAGE_READ_TRIES - 1):
            storage.answer(allow=False)
        storage.answer()
        assert fault.wait() == [["image"]]
        eventually(lambda: served.counters().demand == 1, "it is counted as any other")
        assert (served.counters().poisoned, served.warnings()) == (0, [])
