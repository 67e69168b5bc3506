"""The native core as its readers see it: its stub is true, and each unsafe block says why it is sound."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .tree import ROOT, files, name

UNSAFE = re.compile(r"\bunsafe\s+(?:\{|impl\b)")
COMMENT = re.compile(r"^\s*(?://|#\[)")


def unexplained(text: str) -> list[int]:
    """Numbers of the lines with an unsafe block or impl that no ``SAFETY:`` comment stands right above."""
    lines = text.splitlines()
    found = []
    for number, line in enumerate(lines):
        code = line.split("//")[0]
        if UNSAFE.search(code):
            above = number
            while above and COMMENT.match(lines[above - 1]):
                above -= 1
            # A statement that began on an earlier line has its comment above its beginning.
            if "SAFETY:" not in "\n".join(lines[above:number]) and not _begun_above(lines, number):
                found.append(number + 1)
    return found


def _begun_above(lines: list[str], number: int) -> bool:
    while number and not re.search(r"[;{}]\s*$", lines[number - 1]):
        number -= 1
        if COMMENT.match(lines[number]):
            return "SAFETY:" in "\n".join(lines[max(0, number - 6) : number + 1])
    return False


def test_each_unsafe_block_says_why_it_is_sound() -> None:
    wrong = {name(path): found for path in files(".rs") if (found := unexplained(path.read_text("utf-8")))}
    assert not wrong


def test_a_block_without_a_reason_is_found() -> None:
    assert unexplained("fn f() {\n    unsafe { g() }\n}\n") == [2]
    assert unexplained("fn f() {\n    // SAFETY: g asks for nothing.\n    unsafe { g() }\n}\n") == []
    assert unexplained("// SAFETY: old.\nfn f() {\n    unsafe { g() }\n}\n") == [3]


def test_the_stub_is_the_module() -> None:
    if importlib.util.find_spec("vmd_core") is None:
        pytest.skip("the native core is not built")
    env = {**os.environ, "MYPYPATH": str(ROOT / "crates" / "vmd-core")}
    allowed = Path(__file__).with_name("stubtest_allow.txt")
    command = [sys.executable, "-m", "mypy.stubtest", "vmd_core", "--allowlist", str(allowed)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
