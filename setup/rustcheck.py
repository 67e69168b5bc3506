"""Format, lints and tests of the crates; a tool that is not there is named, not passed over in silence."""

from __future__ import annotations

import subprocess
import sys
import sysconfig

from . import interleave, rust
from .common import ROOT, say

_FUZZ = ("--manifest-path", "fuzz/Cargo.toml")  # a workspace of its own, compiled by `make fuzz` only
_CHECKS = (
    ("fmt", "--all", "--check"),
    ("fmt", *_FUZZ, "--check"),
    ("clippy", "--workspace", "--all-targets", "--locked", "--quiet", "--", "-D", "warnings"),
    ("clippy", "--workspace", "--all-targets", *interleave.FEATURES, "--locked", "--quiet", "--", "-D", "warnings"),
    ("test", "--workspace", "--locked", "--quiet"),
)
_INTERLEAVINGS = 2000


def main(checks: tuple[tuple[str, ...], ...], interleavings: int) -> int:
    """Run ``checks``, then so many interleavings with debug assertions; 1 when one of them found something."""
    env = rust.environment()
    if env is None:
        say("no usable Rust: format, lints and tests of the core are SKIPPED")
        return 0
    # The tests are programs that embed Python, which may not be where the loader looks.
    libraries = [sysconfig.get_config_var("LIBDIR"), env.get("LD_LIBRARY_PATH")]
    env["LD_LIBRARY_PATH"] = ":".join(filter(None, libraries))
    for check in checks:
        if not _has(check[0], env):
            say(f"cargo {check[0]} is not installed: SKIPPED; fix: rustup component add rustfmt clippy")
        elif subprocess.run(["cargo", *check], env=env, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode:
            return 1
    return _interleave(env, interleavings) if interleavings else 0


def _interleave(env: dict[str, str], count: int) -> int:
    """No userfaultfd (a container may forbid it) is named, not passed over in silence."""
    code = interleave.run(env, "--count", str(count), profile="dev")
    if code == interleave.CANNOT:
        say("interleavings: SKIPPED")
        return 0
    return int(code != 0)


def _has(command: str, env: dict[str, str]) -> bool:
    """False when ``command`` is a component that is not installed; `test` always is."""
    asked = ["cargo", command, "--version"]
    return command == "test" or not subprocess.run(asked, env=env, capture_output=True, check=False).returncode


if __name__ == "__main__":
    formatting = (("fmt", "--all"), ("fmt", *_FUZZ))
    sys.exit(main(formatting, 0) if sys.argv[1:] == ["--format"] else main(_CHECKS, _INTERLEAVINGS))
