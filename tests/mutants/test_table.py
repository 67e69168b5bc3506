"""The table of sabotages fits the core as it is: hunting takes minutes, this takes none."""

from __future__ import annotations

import pytest

from setup.common import ROOT

from .suite import CONTRACT
from .table import MUTANTS, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_is_found_exactly_once(mutant: Mutant) -> None:
    text = (ROOT / "crates" / "vmd-core" / "src" / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    assert mutant.new != mutant.old


def test_names_are_unique_and_tests_are_there() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    named = {f"test_{stem}.py" for mutant in MUTANTS for stem in mutant.tests.split()}
    assert named <= {path.name for path in (ROOT / CONTRACT).iterdir()}
