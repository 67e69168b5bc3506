"""What the fixtures of the contract suite do not do: a core of one's own, and things done behind a core's back."""

from __future__ import annotations

import ctypes
import fcntl
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from tests.contract.world import Memory
from tests.fakes.vmm import FakeVmm
from vmd.pages import uffd
from vmd.pages.contract import PageCore, Service
from vmd.pages.cores import make_core
from vmd.pages.handshake import Handshake
from vmd.pages.source import Image

COPY_MODE_DONTWAKE = 1


@contextmanager
def serving(core: str, handshake: Handshake, image: Memory) -> Iterator[PageCore]:
    """A core that serves demand alone, stopped and joined at the end."""
    served = make_core(core, handshake, Image(image.path), Service())
    try:
        served.start()
        yield served
    finally:
        served.stop()
        served.join()


def put_asleep(image: Memory, vmm: FakeVmm, handshake: Handshake, page: int) -> None:
    """Install a page and leave those who wait for it waiting."""
    with image.path.open("rb") as file:
        file.seek(vmm.regions.offset(page))
        source = ctypes.create_string_buffer(file.read(image.page_size), image.page_size)
    start = vmm.regions.address(page)
    copy = struct.pack("=4Qq", start, ctypes.addressof(source), image.page_size, COPY_MODE_DONTWAKE, 0)
    fcntl.ioctl(handshake.uffd, uffd.UFFDIO_COPY, copy)


def unregister(vmm: FakeVmm, handshake: Handshake, page: int) -> None:
    """Take one page out of the userfaultfd's care: the memory mapping around it falls into two."""
    span = struct.pack("=2Q", vmm.regions.address(page), vmm.regions.page_size)
    fcntl.ioctl(handshake.uffd, uffd.UFFDIO_UNREGISTER, span)
