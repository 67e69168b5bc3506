"""Fixtures of the hostile suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.peer import Server
from vmd import limits


@pytest.fixture
def server(run_dir: Path) -> Iterator[Server]:
    """A listener at ``run_dir/s``. The watch of every test sees to it that no descriptor is left."""
    server = Server(run_dir / "s")
    yield server
    server.close()


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> float:
    """How long a peer may take here for its handshake, seconds."""
    monkeypatch.setattr(limits, "HANDSHAKE_PEER_SECONDS", 0.3)
    return limits.HANDSHAKE_PEER_SECONDS
