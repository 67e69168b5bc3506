"""Neither the userfaultfd nor the connection need say that a VMM has died: only its pidfd does."""

from __future__ import annotations

import ctypes
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.contract.world import Serve
from tests.fakes.vmm import FakeVmm
from vmd.pages.contract import EndReason
from vmd.pages.handshake import Handshake

pytestmark = pytest.mark.needs_uffd

SYS_PIDFD_GETFD = 438


def copies(vmm: FakeVmm, handshake: Handshake) -> list[int]:
    """Descriptors of ours that keep the userfaultfd and the VMM's ends of its connections open after its death."""
    libc = ctypes.CDLL(None, use_errno=True)
    sockets = [int(fd.name) for fd in Path(f"/proc/{vmm.pid}/fd").iterdir() if str(fd.readlink()).startswith("socket:")]
    taken = [libc.syscall(SYS_PIDFD_GETFD, handshake.pidfd, fd, 0) for fd in sockets]
    assert len(taken) >= 2
    assert min(taken) >= 0, os.strerror(ctypes.get_errno())
    return [os.dup(handshake.uffd), *taken]


def test_it_ends_though_everything_else_stays_open(serve: Serve) -> None:
    with ExitStack() as stack:

        def keep(vmm: FakeVmm, handshake: Handshake) -> None:
            for fd in copies(vmm, handshake):
                stack.callback(os.close, fd)

        served = serve(8, before=keep)
        assert served.vmm.verdicts([1]) == ["image"]
        served.vmm.kill()
        served.vmm.wait()
        served.ends(EndReason.GONE, 10)
