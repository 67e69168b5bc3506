"""The tree as the house tests see it: what is in git or about to be, and the syntax of the Python in it."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "vmd"


@functools.cache
def files(*suffixes: str) -> tuple[Path, ...]:
    """Files that git knows or would take, by the end of their name; all of them without ``suffixes``."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = (ROOT / line for line in listing.splitlines())
    return tuple(path for path in paths if path.is_file() and (not suffixes or path.suffix in suffixes))


@functools.cache
def syntax(path: Path) -> ast.Module:
    """The parsed Python file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name(path: Path) -> str:
    """``path`` as it is written in messages."""
    return str(path.relative_to(ROOT))
