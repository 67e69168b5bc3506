"""One mutant from substitution to verdict.

Killed means: a test failed over the mutant, and failed again when run alone. A test that fails only
once was disturbed by something else; the hunt goes on without it. The tests that the table names
come first, then the rest of the contract suite: a mutant survives only all of it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from .crate import TREE, BuildError, Crate, digest
from .suite import CONTRACT, Outcome, run
from .table import Mutant


@dataclass(frozen=True)
class Verdict:
    """``killer``: the node id of the test that noticed; None: the mutant survived, ``words`` say how."""

    mutant: Mutant
    killer: str | None
    words: str


def hunt(crate: Crate, mutant: Mutant, baseline: str, test_seconds_max: int) -> Verdict:
    """Build ``mutant`` and let the suite look for it. ``baseline``: digest of the module as it is."""
    started = time.monotonic()
    try:
        module = crate.build(mutant)
    except BuildError as failure:
        return Verdict(mutant, None, f"DOES NOT COMPILE\n{failure}")
    if digest(module) == baseline:
        return Verdict(mutant, None, "CHANGES NOTHING: the module is the same, byte for byte")
    built = time.monotonic() - started
    named = [str(CONTRACT / f"test_{stem}.py") for stem in mutant.tests.split()]
    rest = sorted(set(contract_tests()) - set(named))
    tests_run = 0
    for stage in (named, rest):
        outcome, words = _search(module, stage, test_seconds_max)
        tests_run += len(outcome.passed)
        if outcome.failed:
            where = "" if stage is named else " (none of the tests named in the table)"
            after = f"killed by {_short(outcome.failed)} after {outcome.seconds:.1f} s{where}"
            return Verdict(mutant, outcome.failed, f"{after}{words}; {tests_run} passed before; built in {built:.0f} s")
        if outcome.hung:
            return Verdict(mutant, None, f"HANGS THE SUITE in {_short(outcome.hung)} without a failure{words}")
    return Verdict(mutant, None, f"SURVIVED all {tests_run} tests{words}")


def contract_tests() -> list[str]:
    """All files of the contract suite."""
    return [str(path.relative_to(TREE)) for path in sorted((TREE / CONTRACT).glob("test_*.py"))]


def _search(module: Path, tests: list[str], seconds_max: int) -> tuple[Outcome, str]:
    """Run ``tests`` until one fails twice; says in words which failed only once."""
    disturbed: list[str] = []
    while True:
        outcome = run(module, tests, seconds_max, disturbed)
        words = f" (failed once only: {', '.join(map(_short, disturbed))})" if disturbed else ""
        if outcome.failed is None or run(module, [outcome.failed], seconds_max).failed:
            return outcome, words + (f", in its {outcome.phase}" if outcome.failed and outcome.phase != "call" else "")
        disturbed.append(outcome.failed)


def _short(node: str) -> str:
    return node.removeprefix(f"{CONTRACT}/")
