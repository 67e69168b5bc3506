"""A snapshot of a VM whose memory has not all arrived must hold all of it: taking it fetches the rest."""

from __future__ import annotations

import pytest

from tests.system.pages_serve.command import Serve, installed
from tests.system.pages_serve.machine import Frozen, MakeThawed

pytest_plugins = ["tests.system.pages_serve.fixtures"]
pytestmark = [pytest.mark.needs_kvm, pytest.mark.needs_uffd]


@pytest.mark.parametrize("core", ["native", "reference"])
def test_a_full_snapshot_in_the_middle_of_a_lazy_restore(
    serve_pages: Serve, frozen: Frozen, make_thawed: MakeThawed, core: str
) -> None:
    server, lazy = serve_pages(frozen.memory, "--no-prefetch", core=core), make_thawed()
    lazy.thaw(frozen, server.socket)
    assert lazy.ask("ping") == "pong"
    assert installed(server.fresh_stats()) < frozen.pages / 100
    state, memory = lazy.snapshot()
    assert installed(server.fresh_stats()) == frozen.pages
    lazy.process.kill()
    server.ends(0)
    again = make_thawed()
    again.load(state, memory)
    assert again.is_right()
