"""``python -m fuzz.sanitize [KIND] [pytest's arguments]``: the contract suite over a core under a sanitizer.

A sanitizer's runtime must be in the program itself, so the program is a Python interpreter of ours with the core
built in (`rust/python.rs`). Only code that was compiled for it is watched: the core, and for ThreadSanitizer Rust's
own library, whose locks would otherwise be taken for none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setup.common import ROOT, VENV, say

from . import stdsource
from .targets import FUZZ, TRIPLE, cargo_environment

BUILD = ROOT / "build" / "sanitize"
KINDS = ("address", "thread")
_TEST_SECONDS_MAX = 300
# What the fake VMM does on purpose ends in SIGBUS. Python keeps what it has to its very end: no leak is told.
_OPTIONS = {"address": "detect_leaks=0:handle_sigbus=0", "thread": "handle_sigbus=0:history_size=4"}
_VARIABLES = {"address": "ASAN_OPTIONS", "thread": "TSAN_OPTIONS"}
_RUNTIMES = {"address": "asan", "thread": "tsan"}


@dataclass(frozen=True)
class Compiler:
    """A compiler's environment, and what it needs to be told beside the kind of sanitizer."""

    env: dict[str, str]
    flags: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    link: tuple[str, ...] = ()


def main() -> int:
    """1 when something was reported, or a test failed."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.sanitize")
    parser.add_argument("kind", nargs="?", choices=KINDS, help="default: both")
    kind, rest = parser.parse_known_args()
    codes = [_sanitize(each, rest) for each in KINDS if kind.kind in (None, each)]
    return 1 if any(codes) else 0


def _sanitize(kind: str, tests: list[str]) -> int:
    compiler = _compiler(kind)
    if compiler is None:
        return 0
    say(f"building a Python with the core under {kind.capitalize()}Sanitizer")
    python = _build(kind, compiler)
    reports = BUILD / kind / "reports"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir()
    options = f"{_OPTIONS[kind]}:log_path={reports}/report"
    command = ["nice", str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native"]
    command += [f"--timeout={_TEST_SECONDS_MAX}", *(tests or ["tests/contract"])]
    env = {**os.environ, "LD_LIBRARY_PATH": compiler.env["LD_LIBRARY_PATH"], _VARIABLES[kind]: options}
    code = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, check=False).returncode
    found = sorted(reports.iterdir())
    for report in found:
        print(report.read_text("utf-8", "replace"))
    print(
        f"{kind}: {'no' if not found else len(found)} reports, tests {'passed' if code == 0 else 'FAILED'}", flush=True
    )
    return code or len(found)


def _build(kind: str, compiler: Compiler) -> Path:
    """The interpreter, in a virtual environment that shares the packages of ours."""
    target = BUILD / kind / "cargo"
    flags = " ".join((f"-Zsanitizer={kind}", *compiler.flags))
    # Stable compilers take unstable flags under this variable; no nightly is needed.
    env = {**compiler.env, "RUSTC_BOOTSTRAP": "1", "RUSTFLAGS": flags, "CARGO_TARGET_DIR": str(target)}
    options = ["--release", "--locked", "--quiet", "--bin", "python", "--target", TRIPLE, *compiler.options]
    command = ["nice", "cargo", "rustc", *options, "--", *compiler.link]
    subprocess.run(command, cwd=FUZZ, env=env, stdin=subprocess.DEVNULL, check=True)
    home = BUILD / kind / "venv"
    (home / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(VENV / "pyvenv.cfg", home)
    if not (home / "lib").exists():
        (home / "lib").symlink_to(VENV / "lib")
    return Path(shutil.copy(target / TRIPLE / "release" / "python", home / "bin"))


def _compiler(kind: str) -> Compiler | None:
    """One that can build it; None, with a word, where there is none."""
    env = cargo_environment()
    if env is None:
        say(f"no usable Rust: {kind} SKIPPED")
        return None
    runtime = next(_sysroot(env).glob(f"lib/rustlib/{TRIPLE}/lib/librustc-*_rt.{_RUNTIMES[kind]}.a"), None)
    if runtime is None:
        say(f"this Rust has no runtime of {kind.capitalize()}Sanitizer (rustup's has): SKIPPED")
        return None
    if kind == "address":
        return Compiler(env)
    whole = ("-Zbuild-std=std,panic_unwind",)
    if (_sysroot(env) / "lib/rustlib/src/rust/library").is_dir():
        return Compiler(env, options=whole)
    if (other := stdsource.compiler(env)) is None:
        say("no source of Rust's library: thread SKIPPED; fix: rustup component add rust-src")
        return None
    link = tuple(f"-Zpre-link-arg={word}" for word in ("-Wl,--whole-archive", runtime, "-Wl,--no-whole-archive"))
    return Compiler(other, flags=("-Zexternal-clangrt",), options=whole, link=link)


def _sysroot(env: dict[str, str]) -> Path:
    done = subprocess.run(["rustc", "--print", "sysroot"], env=env, capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


if __name__ == "__main__":
    sys.exit(main())
