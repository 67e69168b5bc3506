"""A host whose pager serves fake VMs over real userfaultfds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pager.world import Gate, Host
from vmd import limits
from vmd.errors import VmdError
from vmd.pages.cores import core_name
from vmd.settings import Settings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here needs userfaultfd."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.needs_uffd)


@pytest.fixture
def idle_seconds() -> float:
    """How long the pager stays without a VM: shorter than it is, since each test waits for it."""
    return 0.05


@pytest.fixture
def host(
    run_dir: Path, state_dir: Path, tmp_path: Path, idle_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Host]:
    """See `Host`; no VM and no pager yet. At its end nothing may be left but a log that says something."""
    try:
        core_name("native")
    except VmdError as missing:
        pytest.skip(f"native core not built ({missing})")
    monkeypatch.setattr(limits, "PAGER_IDLE_SECONDS", idle_seconds)
    made = Host(Settings.read(), tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """See `Gate`."""
    return Gate(tmp_path, monkeypatch)
