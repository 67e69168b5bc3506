"""A page server that is killed freezes its VM: it must not go on with zeros, and another must take over."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.vmm import FakeVmm, eventually
from tests.system.pages_serve.command import MakeMemory, MakeVmm, PageServer, Serve, installed
from tests.traps.takeover import Adopt, kill

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd

PAGES, VCPUS = 1 << 15, 4
HOLES = range(0, PAGES, 7)
GIVEN_BACK = range(0, PAGES, 64)
"""Removed before anybody is killed; every second one had been touched."""
SWEPT = [page for page in range(PAGES) if page not in GIVEN_BACK]
KILLED_AT = range(1000, 21_000, 5000)
"""Resident pages at which one page server after the other dies, in the middle of whatever it does."""


def freeze(server: PageServer, vmm: FakeVmm, pages: int) -> None:
    """Kill the server once so many pages are in: all vCPUs come to wait, and none of them gets further."""
    eventually(lambda: installed(server.fresh_stats()) > pages, f"{pages} pages are in")
    kill(server)
    eventually(lambda: vmm.blocked() == VCPUS, "all vCPUs wait")
    assert vmm.is_alive()


def test_four_page_servers_die_in_one_sweep(
    serve_pages: Serve, adopt: Adopt, make_memory: MakeMemory, make_vmm: MakeVmm, journal: Path
) -> None:
    memory = make_memory(PAGES, HOLES)
    server: PageServer = serve_pages(memory, "--no-prefetch", "--journal", journal)
    vmm = make_vmm(memory)
    vmm.handshake(server.socket)
    vmm.do("read", GIVEN_BACK[::2])
    vmm.do("remove", GIVEN_BACK)
    sweep = vmm.start("verdict", SWEPT, threads=VCPUS, split=True)
    for pages in KILLED_AT:
        freeze(server, vmm, pages)
        assert sweep.results() is None
        server = adopt(vmm, journal)
    for number, verdicts in enumerate(sweep.wait(60)):
        assert verdicts == ["zero" if page in HOLES else "image" for page in SWEPT[number::VCPUS]]
    assert vmm.verdicts(GIVEN_BACK) == ["zero"] * len(GIVEN_BACK)
    assert installed(server.fresh_stats()) == len(vmm.resident()) == PAGES
    vmm.kill()
    server.ends(0)
    assert not journal.exists()
