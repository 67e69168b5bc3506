"""The pid of a peer that has died may be another process by the time we ask who it is: that one is not our VMM."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.contract.world import MakeImage, is_readable
from tests.fakes.vmm import FakeVmm, Span, eventually
from tests.traps.behind import serving
from vmd.pages import peer
from vmd.pages.contract import EndReason
from vmd.pages.handshake import Listener, receive

pytestmark = pytest.mark.needs_uffd

LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
TRIES = 50


def newcomer(pid: int, stack: ExitStack) -> subprocess.Popen[bytes]:
    """A process that has ``pid``, which is free."""
    for _ in range(TRIES):  # another process of the host may be born between the two lines
        LAST_PID.write_text(str(pid - 1))
        process = stack.enter_context(subprocess.Popen(["sleep", "60"]))
        stack.callback(process.kill)
        if process.pid == pid:
            return process
    raise AssertionError(f"pid {pid} was not to be had")


@pytest.mark.parametrize("new_kernel", [True, False])
def test_a_vmm_that_died_before_it_was_accepted(
    core: str, run_dir: Path, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch, new_kernel: bool
) -> None:
    if not new_kernel:
        monkeypatch.setattr(peer, "SO_PEERPIDFD", 9999)  # ENOPROTOOPT, as before Linux 6.5
    image = make_image(4)
    with ExitStack() as stack:
        listener = Listener(run_dir / "s")
        stack.callback(listener.close)
        with FakeVmm(image.path, [Span(4, 0)]) as vmm:
            vmm.handshake(listener.path)
            vmm.kill()
            vmm.wait()
            other = newcomer(vmm.pid, stack)
            handshake = receive(listener, image.path.stat().st_size, -1, 5.0, retry=False)
        assert handshake is not None
        assert handshake.vmm_pid == other.pid
        with serving(core, handshake, image) as served:
            eventually(lambda: is_readable(served.ended_fd), "the core sees that its VMM has gone", 10)
            assert served.join().reason is EndReason.GONE
        assert other.poll() is None
