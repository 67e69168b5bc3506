"""The traps of the field are all accounted for: each has its test, or the reason why it cannot occur here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.traceability.ledger import read_list

from .tree import ROOT, syntax

TRAPS = ROOT / "tests" / "traps"
COUNT = 35
SENTENCE_WORDS_MIN = 8


def by_number() -> dict[int, Path]:
    """The test files by the number of their trap."""
    found = {}
    for path in sorted(TRAPS.glob("test_*.py")):
        number = re.fullmatch(r"test_trap_(\d\d)", path.stem)
        assert number, f"{path.name}: expected test_trap_NN.py"
        found[int(number[1])] = path
    return found


def test_each_trap_is_accounted_for_once() -> None:
    numbers = [*by_number(), *read_list(TRAPS / "cannot_occur.txt")]
    assert sorted(numbers) == list(range(1, COUNT + 1))


def test_each_file_names_its_trap_and_tests_it() -> None:
    words = {}
    for number, path in by_number().items():
        module = syntax(path)
        words[number] = ast.get_docstring(module) or ""
        assert any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in module.body), path
        assert len(words[number].split()) >= SENTENCE_WORDS_MIN, f"{path.name}: what is the trap?"
    assert len(set(words.values())) == len(words)


def test_a_trap_that_cannot_occur_says_why_in_a_sentence() -> None:
    for number, sentence in read_list(TRAPS / "cannot_occur.txt").items():
        assert sentence.endswith("."), number
        assert len(sentence.split()) >= SENTENCE_WORDS_MIN, number
