"""A compiler with the source of its library, out of Debian's packages, unpacked and not installed.

ThreadSanitizer wants Rust's library compiled for it. Its source comes with rustup's component rust-src, which not
every machine can fetch; Debian's stable releases carry a recent compiler (to build browsers with) and its source.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from setup.common import ROOT, SetupError, apt_update, run, say

_FOLDER = ROOT / "build" / "sanitize" / "debian"
_ROOTS = ("rustc-web", "rust-web-src")
# Of what they depend on, the parts that are not on every machine with a compiler.
_WANTED = re.compile(r"Depends: (libstd-rust-web[\w.-]*|libllvm\d+)$", re.MULTILINE)


def compiler(env: dict[str, str]) -> dict[str, str] | None:
    """``env`` with that compiler in it; None where its packages cannot be had."""
    if not shutil.which("apt-get"):
        return None
    unpacked = _FOLDER / "root"
    try:
        if not unpacked.is_dir():
            _unpack(unpacked)
    except SetupError as failed:
        say(str(failed))
        return None
    libraries = f"{unpacked}/usr/lib/x86_64-linux-gnu:{env['LD_LIBRARY_PATH']}"
    return {**env, "RUSTC": str(unpacked / "usr/bin/rustc"), "LD_LIBRARY_PATH": libraries}


def _unpack(unpacked: Path) -> None:
    """Raises `SetupError`. Complete when it is there."""
    say("fetching a Rust compiler with its library's source from Debian (140 MB)")
    shutil.rmtree(_FOLDER, ignore_errors=True)
    half = _FOLDER / "half"
    half.mkdir(parents=True)
    if os.geteuid() == 0:
        apt_update()
    run("sh", "-c", 'cd "$0" && exec apt-get download -qq "$@"', _FOLDER, *_packages())
    for package in _FOLDER.glob("*.deb"):
        run("dpkg-deb", "-x", package, half)
        package.unlink()
    half.rename(unpacked)


def _packages() -> list[str]:
    found: list[str] = []
    waiting = [*_ROOTS]
    while waiting:
        found.append(waiting.pop())
        shown = subprocess.run(["apt-cache", "depends", found[-1]], capture_output=True, text=True, check=False)
        waiting += [name for name in _WANTED.findall(shown.stdout) if name not in found + waiting]
    return found
