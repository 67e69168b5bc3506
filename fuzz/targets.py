"""The targets, and how each is started: Python under Atheris, Rust as a program of its own; both hold libFuzzer."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

from setup import rust
from setup.common import ROOT, say

FUZZ = ROOT / "fuzz"
SEEDS = FUZZ / "seeds"
BUILD = ROOT / "build" / "fuzz"
TRIPLE = "x86_64-unknown-linux-gnu"
"""Named, so that flags for the targets do not reach the build scripts."""

# What `cargo fuzz` would pass, but for the parts that only an unstable compiler takes.
_COVERAGE = (
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
)


@dataclass(frozen=True)
class Target:
    """A program that takes libFuzzer's arguments."""

    name: str
    command: tuple[str, ...]
    env: dict[str, str]


def names() -> list[str]:
    """All targets, Python's first."""
    return [*_python_names(), *_rust_names()]


def prepare(wanted: list[str]) -> list[Target]:
    """Those of ``wanted`` that can run here; builds what must be built."""
    python = [_python(name) for name in _python_names() if name in wanted]
    crates = [name for name in _rust_names() if name in wanted]
    return python + (_build(crates) if crates else [])


def cargo_environment() -> dict[str, str] | None:
    """As `rust.environment`, and programs that embed Python find it."""
    env = rust.environment()
    if env is not None:
        libraries = [sysconfig.get_config_var("LIBDIR"), env.get("LD_LIBRARY_PATH")]
        env["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    return env


def _python_names() -> list[str]:
    return sorted(path.stem for path in (FUZZ / "python").glob("[!_]*.py") if path.stem != "drive")


def _rust_names() -> list[str]:
    bins = tomllib.loads((FUZZ / "Cargo.toml").read_text("utf-8"))["bin"]
    return [each["name"] for each in bins if "fuzzing" in each.get("required-features", ())]


def _python(name: str) -> Target:
    return Target(name, (sys.executable, "-m", "fuzz.python.drive", name), dict(os.environ))


def _build(crates: list[str]) -> list[Target]:
    env = cargo_environment()
    if env is None:
        say(f"no usable Rust: {', '.join(crates)} SKIPPED")
        return []
    env |= {"RUSTFLAGS": " ".join(_COVERAGE), "CARGO_TARGET_DIR": str(BUILD / "cargo")}
    wanted = [word for name in crates for word in ("--bin", name)]
    options = ["--release", "--locked", "--quiet", "--features", "fuzzing", "--target", TRIPLE]
    say("building the Rust targets")
    subprocess.run(["nice", "cargo", "build", *options, *wanted], cwd=FUZZ, env=env, check=True)
    return [Target(name, (str(_program(name)),), env) for name in crates]


def _program(name: str) -> Path:
    return BUILD / "cargo" / TRIPLE / "release" / name
