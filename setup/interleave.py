"""Builds and runs the runner of interleavings: page servers that die, over a real userfaultfd; no Python in it."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Mapping

from . import rust
from .common import ROOT, say

CANNOT = 77
"""The runner's exit code where no userfaultfd may be had."""
FEATURES = ("--no-default-features", "--features", "internals")
_SEED_BITS = 40


def run(env: Mapping[str, str], *options: str, profile: str = "release") -> int:
    """Run the runner with ``options``; its exit code, or cargo's."""
    command = ["cargo", "run", "--profile", profile, "--locked", "--quiet", "--package", "vmd-core", *FEATURES]
    command += ["--example", "interleave", "--", *options]
    return subprocess.run(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode


def main(options: list[str]) -> int:
    """As asked for on the command line; without a seed from one that is drawn."""
    env = rust.environment()
    if env is None:
        say("no usable Rust: the runner of interleavings cannot be built")
        return 1
    if not {"--seed", "--from"} & set(options):
        options = [*options, "--from", str(secrets.randbits(_SEED_BITS))]
    return run(env, *options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
