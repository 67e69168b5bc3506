"""The virtual environment: pinned tools and libraries, and this package in place (editable)."""

from __future__ import annotations

import shutil
import subprocess
import sys

from .common import ROOT, VENV, VENV_PYTHON, SetupError, apt_install, run, say, step

CONSTRAINTS = ROOT / "setup" / "constraints.txt"
_BUSY = VENV / ".installing"
"""There while packages are installed: an environment that still has it may hold half of one."""


def _usable() -> bool:
    return (
        not _BUSY.exists()
        and VENV_PYTHON.exists()
        and subprocess.run([VENV_PYTHON, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    )


def _create() -> None:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    try:
        import ensurepip  # noqa: F401
    except ImportError:  # Debian leaves it to a package of its own
        package = f"{version}-venv"
        if not apt_install([package]):
            fix = f"apt install {package}, or name another Python by PYTHON="
            raise SetupError(f"{sys.executable} cannot make virtual environments", fix) from None
    shutil.rmtree(VENV, ignore_errors=True)
    run(sys.executable, "-m", "venv", VENV)


def _pinned(package: str) -> str:
    """``package==version`` from the constraints; what installs the rest cannot be constrained by it."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").split()
    return next(line for line in lines if line.startswith(f"{package}=="))


def _work() -> bool:
    if not _usable():
        say(f"making .venv with {sys.executable}")
        _create()
    _BUSY.touch()
    pip = (VENV_PYTHON, "-m", "pip", "--no-input", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, _pinned("pip"), fix="let pip reach a package index (PIP_INDEX_URL, PIP_PROXY), then run make again")
    run(*pip, "--constraint", CONSTRAINTS, "--group", "dev")
    # Our build tool is already there, pinned; an isolated build would take the newest one.
    run(*pip, "--constraint", CONSTRAINTS, "--no-build-isolation", "--editable", ".")
    _BUSY.unlink()
    return True


if __name__ == "__main__":
    step("venv", _work)
