"""One mutant from substitution to verdict.

Killed means: a test failed over the mutant, and failed again when run alone. A test that fails only
once was disturbed by something else; the hunt goes on without it. The tests that the table names
come first, then the rest of the contract suite: a mutant survives only all of it.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from .crate import TREE, BuildError, digest
from .suite import CONTRACT, Outcome, run
from .table import Mutant


@dataclass(frozen=True)
class Verdict:
    """``killer``: the node id of the test that noticed; None: the mutant survived, ``words`` say how."""

    mutant: Mutant
    killer: str | None
    words: str


def hunt(mutant: Mutant, build: Future[Path], baseline: str, test_seconds_max: int) -> Verdict:
    """Let the suite look for ``mutant`` in what was built of it. ``baseline``: digest of the module as it is."""
    try:
        module = build.result()
    except BuildError as failure:
        return Verdict(mutant, None, f"DOES NOT COMPILE\n{failure}")
    if digest(module) == baseline:
        return Verdict(mutant, None, "CHANGES NOTHING: the module is the same, byte for byte")
    named = [str(CONTRACT / f"test_{stem}.py") for stem in mutant.tests.split()]
    rest = sorted(set(contract_tests()) - set(named))
    passed = 0
    for stage in (named, rest):
        outcome, words = _search(module, stage, test_seconds_max)
        passed += len(outcome.passed)
        if outcome.failed:
            where = "" if stage is named else " (none of those named in the table)"
            words = f"killed by {_short(outcome.failed)}{where} after {outcome.seconds:.1f} s, {passed} passed{words}"
            return Verdict(mutant, outcome.failed, words)
        if outcome.hung:
            return Verdict(mutant, None, f"HANGS THE SUITE in {_short(outcome.hung)} without a failure{words}")
    return Verdict(mutant, None, f"SURVIVED all {passed} tests{words}")


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
