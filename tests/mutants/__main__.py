"""``python -m tests.mutants [NAME ...]``: hunt all mutants, or those named, and report each."""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setup import rust

from .crate import BUILD, BuildError, Crate, StaleTableError, digest
from .hunt import Verdict, contract_tests, hunt
from .suite import BASELINE_TEST_SECONDS_MAX, Outcome, SuiteError, limit, run
from .table import MUTANTS, Mutant


def main() -> int:
    """0 when the core as it is passes and every mutant is killed."""
    chosen, started = _chosen(), time.monotonic()
    try:
        survivors = _hunt_all(chosen)
    except (StaleTableError, BuildError, SuiteError) as failure:
        print(f"{type(failure).__name__}: {failure}", file=sys.stderr)
        return 1
    finally:
        print(f"took {time.monotonic() - started:.0f} s")
    for verdict in survivors:
        print(f"not killed: {verdict.mutant.name} ({verdict.mutant.file}): {verdict.mutant.what}", file=sys.stderr)
    return 1 if survivors else 0


def _chosen() -> list[Mutant]:
    names = [mutant.name for mutant in MUTANTS]
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutant's name (default: all)")
    parser.add_argument("--list", action="store_true", help="list the mutants and end")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"no such mutant: {', '.join(unknown)}")
    if options.list:
        print("\n".join(f"{mutant.name:<22} {mutant.file:<11} {mutant.what}" for mutant in MUTANTS))
        sys.exit()
    return [mutant for mutant in MUTANTS if not options.names or mutant.name in options.names]


def _hunt_all(mutants: list[Mutant]) -> list[Verdict]:
    """The mutants that were not killed."""
    if (env := rust.environment()) is None:
        raise BuildError("no usable Rust: without the native core there is nothing to sabotage")
    BUILD.mkdir(parents=True, exist_ok=True)
    crate = Crate(env)
    crate.check(mutants)
    module = crate.build(None)
    builder = ThreadPoolExecutor(1)
    try:
        builds = [builder.submit(crate.build, mutant) for mutant in mutants]
        healthy = run(module, contract_tests(), BASELINE_TEST_SECONDS_MAX)
        _must_be_green(healthy)
        seconds_max = limit(healthy)
        limits = f"the slowest in {healthy.slowest:.1f} s; over a mutant each has {seconds_max} s"
        print(f"as it is: {len(healthy.passed)} tests pass in {healthy.seconds:.0f} s, {limits}", flush=True)
        verdicts = []
        for number, (mutant, build) in enumerate(zip(mutants, builds, strict=True), 1):
            verdicts.append(verdict := hunt(mutant, build, digest(module), seconds_max))
            print(f"{number:>2}/{len(mutants)} {mutant.name:<19} {verdict.words}", flush=True)
    finally:
        builder.shutdown(cancel_futures=True)
    _tell(verdicts, module, seconds_max)
    return [verdict for verdict in verdicts if not verdict.killer]


def _tell(verdicts: list[Verdict], module: Path, seconds_max: int) -> None:
    """Sum up; the tests that killed must have been right about the core as it is."""
    killers = sorted({verdict.killer for verdict in verdicts if verdict.killer})
    if killers:
        _must_be_green(run(module, killers, seconds_max))
        print(f"as it is: the {len(killers)} tests that killed pass again")
    print(f"{sum(bool(verdict.killer) for verdict in verdicts)} of {len(verdicts)} mutants killed")


def _must_be_green(outcome: Outcome) -> None:
    if outcome.failed or outcome.hung:
        raise SuiteError(f"the core as it is fails in {outcome.failed or outcome.hung}:\n{outcome.output}")


if __name__ == "__main__":
    sys.exit(main())
