"""A usable Rust: found on PATH, else Debian's where that is new enough."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

from .common import ROOT, VENV_PYTHON, SetupError, apt_install, apt_update, say

CRATE = ROOT / "crates" / "vmd-core"

_DEBIAN_PAIRS = (("cargo", "rustc"), ("cargo-web", "rustc-web"))
"""Debian's own, and the newer one that its stable releases carry to build browsers with."""


def required() -> tuple[int, ...]:
    """The crate's ``rust-version``."""
    manifest = tomllib.loads((CRATE / "Cargo.toml").read_text(encoding="utf-8"))
    return _numbers(manifest["package"]["rust-version"])


def environment() -> dict[str, str] | None:
    """An environment in which ``cargo`` and ``rustc`` run and are new enough; None when there is none."""
    for env in _candidates():
        if all(_version(tool, env) >= required() for tool in ("cargo", "rustc")):
            return env
    return None


def install() -> dict[str, str] | None:
    """Debian's Rust where it is new enough and may be installed; as `environment`."""
    if os.geteuid() != 0 or not _which("apt-cache"):
        return None
    try:
        apt_update()
    except SetupError as failed:
        say(str(failed))
        return None
    for pair in _DEBIAN_PAIRS:
        if _offered(pair[1]) >= required() and apt_install([*pair, "gcc", "libc6-dev"]):
            return environment()
    return None


def _candidates() -> Iterator[dict[str, str]]:
    """The environment as it is, then with each ``cargo`` on PATH or in the home first."""
    yield _with_python(dict(os.environ))
    folders = [*os.environ.get("PATH", "").split(":"), str(Path.home() / ".cargo" / "bin")]
    for folder in map(Path, dict.fromkeys(folders)):
        if (folder / "cargo").exists():
            env = {**os.environ, "PATH": f"{folder}:{os.environ.get('PATH', '')}"}
            # rustup's cargo looks for its toolchains in HOME, which may not be the one it was installed in.
            if (toolchains := folder.parent.parent / ".rustup").is_dir():
                env.setdefault("RUSTUP_HOME", str(toolchains))
            yield _with_python(env)


def _with_python(env: dict[str, str]) -> dict[str, str]:
    return {**env, "PYO3_PYTHON": str(VENV_PYTHON)}


def _version(tool: str, env: dict[str, str]) -> tuple[int, ...]:
    try:
        done = subprocess.run([tool, "--version"], env=env, capture_output=True, text=True, check=False)
    except OSError:
        return ()
    words = done.stdout.split()
    return _numbers(words[1]) if done.returncode == 0 and len(words) > 1 else ()


def _offered(package: str) -> tuple[int, ...]:
    """The version of ``package`` that apt would install, () when there is none."""
    done = subprocess.run(["apt-cache", "policy", package], capture_output=True, text=True, check=False)
    found = re.search(r"Candidate: (?:\d+:)?([\d.]+)", done.stdout)
    return _numbers(found[1]) if found else ()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _which(tool: str) -> bool:
    return any((Path(folder) / tool).exists() for folder in os.environ.get("PATH", "").split(":"))
