"""House numbers: what does not fit on a few screens is told in steps."""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.traceability.plugin import HOUSE_LINES

from .tree import files, name, syntax

FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
FUNCTION_LINES_MEDIAN = 12
FUNCTION_LINES_P90 = 35
CLASS_LINES_MAX = 300
PUBLIC_METHODS_MAX = 15

_NOISE = re.compile(
    r"""
    //[^\n]* | /\*.*?\*/                    # comments
    | r(\#*)".*?"\1 | b?"(?:\\.|[^"\\])*"   # strings
    | b?'(?:\\.[^']*|[^'\\\n])'             # characters, but not lifetimes
    """,
    re.VERBOSE | re.DOTALL,
)
_RUST_FN = re.compile(r"\bfn\s+(\w+)")
_ARRAY_LENGTH = re.compile(r";(?=[^;{}\[\]\n]*\])")


def python_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def rust_functions(text: str) -> Iterator[tuple[str, int]]:
    """Names and lengths of the functions that have a body; strings and comments hold no braces that count."""
    bare = _NOISE.sub(lambda noise: "\n" * noise[0].count("\n"), text)
    bare = _ARRAY_LENGTH.sub(",", bare)  # a `;` ends a declaration, but not inside `[u8; 4]`
    for found in _RUST_FN.finditer(bare):
        start = next((i for i in range(found.end(), len(bare)) if bare[i] in "{;"), len(bare))
        if start < len(bare) and bare[start] == "{":
            yield found[1], bare.count("\n", found.start(), _closing(bare, start)) + 1


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return i
    raise AssertionError("braces do not close")


def functions() -> list[tuple[Path, str, int]]:
    found = [(path, *function) for path in files(".py") for function in python_functions(path)]
    found += [(path, *function) for path in files(".rs") for function in rust_functions(path.read_text("utf-8"))]
    return found


def test_files_are_short() -> None:
    long = {
        name(path): lines
        for path in files(".py", ".rs", ".c", ".h", ".S", ".sh")
        if (lines := path.read_text("utf-8").count("\n")) >= FILE_LINES_MAX
    }
    assert not long


def test_functions_are_short(request: pytest.FixtureRequest) -> None:
    found = functions()
    long = [f"{name(path)}: {function}: {n}" for path, function, n in found if n > FUNCTION_LINES_MAX]
    shipped = [n for path, _, n in found if name(path).startswith(("src/", "crates/"))]
    median, p90 = statistics.median(shipped), statistics.quantiles(shipped, n=10)[-1]
    numbers = f"median {median:.0f}, p90 {p90:.0f}, max {max(shipped)}"
    request.config.stash[HOUSE_LINES].append(f"house: {len(shipped)} functions in src and crates, lines: {numbers}")
    assert not long
    assert median <= FUNCTION_LINES_MEDIAN
    assert p90 <= FUNCTION_LINES_P90


def test_classes_do_one_thing() -> None:
    wrong = []
    for path in files(".py"):
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.ClassDef):
                # A fake may need a method for each way of lying.
                methods_max = PUBLIC_METHODS_MAX if name(path).startswith("src/") else 2 * PUBLIC_METHODS_MAX
                members = [m for m in node.body if isinstance(m, ast.FunctionDef | ast.AsyncFunctionDef)]
                public = [m for m in members if not m.name.startswith("_") and not m.name.startswith("test_")]
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if len(public) > methods_max or lines > CLASS_LINES_MAX:
                    wrong.append(f"{name(path)}: {node.name}: {lines} lines, {len(public)} public methods")
    assert not wrong


def test_rust_functions_are_measured() -> None:
    text = """
        fn one(a: [u8; 4]) -> u8 { a[0] }   // } fn no() {
        fn two() {
            let s = "}"; let c = '}';
        }
        trait T { fn declared(&self); }
    """
    assert list(rust_functions(text)) == [("one", 1), ("two", 3)]
