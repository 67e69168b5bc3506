"""A recording is neither cut at some number of runs nor grown by the next one: it is one start, whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.world import MakeImage, Serve
from tests.system.pages_serve import command
from tests.system.pages_serve.pages import PAGE, read_log, write_log
from vmd.pages.contract import Beside, Service
from vmd.recording import offsets_for, read_access_log

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = pytest.mark.needs_uffd

RUNS = 70_000
"""More than fit 16 bits."""


def test_seventy_thousand_runs_are_replayed(serve: Serve, make_image: MakeImage, tmp_path: Path) -> None:
    image = make_image(RUNS, holes=range(RUNS))  # holes are as good as data here, and need no memory
    log = write_log(tmp_path / "log", image.offsets(reversed(range(RUNS))))  # downwards, no two join to a run
    offsets = offsets_for(read_access_log(log, RUNS * PAGE), PAGE)
    served = serve(image, service=Service(Beside.REPLAY, offsets))
    counters = served.replayed()
    assert (counters.replay_pages, counters.zero, counters.faults) == (RUNS, RUNS, 0)


@pytest.mark.parametrize("core", ["native", "reference"])
def test_a_new_recording_takes_the_place_of_the_old_one(
    serve_pages: command.Serve, make_memory: command.MakeMemory, make_vmm: command.MakeVmm, tmp_path: Path, core: str
) -> None:
    memory, log = make_memory(64), tmp_path / "access.log"
    for pages in ([40, 7, 9], [8, 40]):
        server, vmm = serve_pages(memory, "--record", log, core=core), make_vmm(memory)
        vmm.handshake(server.socket)
        vmm.do("read", pages)
        vmm.kill()
        server.ends(0)
        assert read_log(log)[1] == [page * PAGE for page in pages]
