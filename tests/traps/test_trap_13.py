"""A page server that fails long after its start must not do so in silence: its VM goes along, and the reason stays."""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest

from tests.system.conftest import Run
from vmd import restore as restoring
from vmd.backend import Request
from vmd.errors import VmdError
from vmd.pages.contract import Injection, Outcome, Service
from vmd.pages.server import PageServer
from vmd.restore import restore
from vmd.settings import Settings
from vmd.tasks import finish

pytestmark = [pytest.mark.needs_kvm, pytest.mark.needs_uffd]

PAGES_BEFORE = 2000
"""More than a start needs, fewer than the guest has."""


def fails_late(*_: Any) -> Service:
    return Service(injections=[Injection("copy", Outcome.FATAL, after=PAGES_BEFORE, errno=errno.EIO)])


def test_a_guest_is_asked_and_its_page_server_fails(
    core: Literal["native", "reference"],
    request_for: Callable[..., Request],
    settings: Settings,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(restoring, "plan_service", fails_late)

    async def story() -> None:
        restored = await restore(request_for("uffd"), replace(settings, core=core))
        try:
            assert restored.pages_alive()
            with pytest.raises(VmdError):  # long before its time is up
                await asyncio.wait_for(restored.ask("check", 60), 20)
            await asyncio.wait_for(restored.vmm.exited(), 5)  # killed, not left waiting
            assert isinstance(restored.pages, PageServer)
            ended = await asyncio.wait_for(asyncio.wrap_future(restored.pages.ended), 5)
            assert re.search(r"at 0x[0-9a-f]+: .*Input/output error", ended.error or "")
            assert not restored.pages_alive()
        finally:
            await finish(restored.close())

    run(story())
