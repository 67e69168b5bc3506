"""The native core, built in release and installed into the environment; without Rust we go on without it."""

from __future__ import annotations

import shutil

from . import rust
from .common import ROOT, VENV, VENV_PYTHON, run, say, step

_WHEELS = ROOT / "build" / "wheels"


def _work() -> bool:
    env = rust.environment() or rust.install()
    if env is None:
        version = ".".join(map(str, rust.required()))
        say(f"no cargo and rustc of at least {version}: going on with the reference core (slow)")
        say(f"  fix: install Rust {version} or newer (rustup, or your distribution's), then run make again")
        return False  # not stamped: the next run looks again
    shutil.rmtree(_WHEELS, ignore_errors=True)
    maturin = VENV / "bin" / "maturin"
    # A wheel is built whole and then installed: an interrupted build leaves the installed core as it was.
    manifest = rust.CRATE / "Cargo.toml"
    options = ("--release", "--locked", "--interpreter", VENV_PYTHON)
    run(maturin, "build", "--manifest-path", manifest, *options, "--out", _WHEELS, env=env)
    (wheel,) = _WHEELS.glob("*.whl")
    run(VENV_PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    return True


if __name__ == "__main__":
    step("core", _work)
