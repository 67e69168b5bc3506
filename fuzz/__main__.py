"""``python -m fuzz [TARGET ...]``: drive each target for a while; what it ran, what it reached, what it found.

``python -m fuzz TARGET --input FILE`` runs one input: a finding again, with the whole output.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setup.common import ROOT

from . import targets
from .targets import BUILD, SEEDS, Target

_INPUT_SECONDS_MAX = 10
_MEMORY_MIB_MAX = 2048
_ROW = "{:<12} {:>11} {:>9} {:>7} {:>9}"


@dataclass(frozen=True)
class Tally:
    """What came of driving one target. ``edges`` of its code reached; ``finding``: what the first one says."""

    runs: int
    edges: int
    inputs: int
    finding: str | None


def main() -> int:
    """1 when something was found, or a target did not run."""
    options = _options()
    prepared = targets.prepare(options.targets or targets.names())
    if options.input:
        (target,) = prepared
        return subprocess.run([*target.command, options.input], cwd=ROOT, env=target.env, check=False).returncode
    print(f"{options.seconds} s each\n" + _ROW.format("target", "runs", "coverage", "corpus", "findings"), flush=True)
    tallies = []
    for target in prepared:
        tallies.append(_drive(target, options.seconds))
        _show(target, tallies[-1])
    return 1 if any(tally.finding for tally in tallies) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(targets.names())}; default: all")
    parser.add_argument("--seconds", type=int, default=600, help="for each target")
    parser.add_argument("--input", type=Path, metavar="FILE", help="run TARGET with this input only")
    options = parser.parse_args()
    if unknown := sorted(set(options.targets) - set(targets.names())):
        parser.error(f"no such target: {', '.join(unknown)}")
    if options.input and len(options.targets) != 1:
        parser.error("--input needs one TARGET")
    return options


def _drive(target: Target, seconds: int) -> Tally:
    """Until its time is up, or something was found."""
    folder = BUILD / target.name
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-timeout={_INPUT_SECONDS_MAX}", f"-rss_limit_mb={_MEMORY_MIB_MAX}"]
    words = SEEDS / f"{target.name}.dict"
    options = [*limits, "-print_final_stats=1", f"-artifact_prefix={folder}/", *([f"-dict={words}"] * words.exists())]
    command = ["nice", *target.command, *options, str(corpus), str(SEEDS / target.name)]
    log = folder / "log"
    with log.open("wb") as output:
        done = subprocess.run(command, cwd=ROOT, env=target.env, stdout=output, stderr=output, check=False)
    return read_log(log.read_text("utf-8", "replace"), done.returncode, sum(1 for _ in corpus.iterdir()))


def read_log(log: str, code: int, inputs: int) -> Tally:
    """The tally of a run that ended with ``code``; a run that says nothing of itself is a finding too."""
    runs = re.findall(r"^stat::number_of_executed_units:\s*(\d+)", log, re.MULTILINE)
    edges = re.findall(r"\bcov: (\d+)", log)
    finding = None
    if code or not runs:
        said = re.search(r"Uncaught Python exception: ===\n(.*)|panicked at (.*\n.*)|^SUMMARY: (.*)", log, re.MULTILINE)
        what = next(filter(None, said.groups())) if said else log.strip().rpartition("\n")[2]
        kept = re.search(r"Test unit written to (\S+)", log)
        finding = what.replace("\n", ": ") + (f"\n  again: python -m fuzz TARGET --input {kept[1]}" if kept else "")
    return Tally(int(runs[-1]) if runs else 0, int(edges[-1]) if edges else 0, inputs, finding)


def _show(target: Target, tally: Tally) -> None:
    row = (target.name, f"{tally.runs:,}", tally.edges, tally.inputs, 1 if tally.finding else 0)
    print(_ROW.format(*row), flush=True)
    if tally.finding:
        print(
            f"  {tally.finding.replace('TARGET', target.name)}\n  whole output: {BUILD / target.name / 'log'}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
