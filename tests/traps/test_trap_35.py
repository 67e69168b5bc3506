"""What a page server has read and not yet done must outlive it: no fault and no removal may die with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.held import Held
from tests.fakes.vmm import eventually
from tests.system.pages_serve.command import MakeMemory, MakeVmm, Serve, installed
from tests.traps.takeover import Adopt, kill

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd

PAGES, PAGE = 16, 5


@pytest.mark.parametrize("touched", [False, True])
def test_it_dies_with_a_removal_in_its_hands(
    serve_pages: Serve, adopt: Adopt, make_memory: MakeMemory, make_vmm: MakeVmm, journal: Path, touched: bool
) -> None:
    memory = make_memory(PAGES)
    server, vmm = serve_pages(memory, "--no-prefetch", "--journal", journal), make_vmm(memory)
    with Held(server.pid, remove=1) as held:
        vmm.handshake(server.socket)
        if touched:
            assert vmm.verdicts([PAGE]) == ["image"]
        removal = vmm.start("remove", [PAGE])
        held.wait("remove")  # it has been read, and for the VM it is done
        assert removal.wait() == [["ok"]]
        kill(server)
    after = adopt(vmm, journal)
    assert vmm.verdicts() == ["zero" if page == PAGE else "image" for page in range(PAGES)]
    assert installed(after.fresh_stats()) == PAGES
    vmm.kill()
    after.ends(0)


def test_it_dies_with_faults_in_its_hands(
    serve_pages: Serve, adopt: Adopt, make_memory: MakeMemory, make_vmm: MakeVmm, journal: Path
) -> None:
    memory = make_memory(PAGES)
    server, vmm = serve_pages(memory, "--no-prefetch", "--journal", journal), make_vmm(memory)
    with Held(server.pid, copy=vmm.regions.address(PAGE)) as held:
        vmm.handshake(server.socket)
        faults = vmm.start("verdict", [PAGE], threads=3)
        held.wait("copy")
        kill(server)
    eventually(lambda: vmm.blocked() == 3, "all of them wait, and nobody knows of it")
    after = adopt(vmm, journal)
    assert faults.wait() == [["image"]] * 3
    vmm.kill()
    after.ends(0)


def test_it_dies_before_it_has_read_a_word(
    serve_pages: Serve, adopt: Adopt, make_memory: MakeMemory, make_vmm: MakeVmm, journal: Path
) -> None:
    memory = make_memory(PAGES)
    server, vmm = serve_pages(memory, "--no-prefetch", "--journal", journal), make_vmm(memory)
    vmm.handshake(server.socket)
    assert vmm.verdicts([0]) == ["image"]
    kill(server)
    removals = vmm.start("remove", [0, PAGE], threads=2, split=True)
    faults = vmm.start("verdict", [PAGE + 1])
    eventually(lambda: vmm.blocked_in("userfaultfd_event_wait") == 2 and vmm.blocked() == 1, "all of them wait")
    after = adopt(vmm, journal)
    assert removals.wait() == [["ok"]] * 2
    assert faults.wait() == [["image"]]
    assert vmm.verdicts([0, PAGE]) == ["zero", "zero"]
    vmm.kill()
    after.ends(0)
