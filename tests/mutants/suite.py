"""One run of the contract suite's native half over a built module, in a process group of its own."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .crate import BUILD, TREE
from .witness import MODULE, REPORT

CONTRACT = Path("tests", "contract")
BASELINE_TEST_SECONDS_MAX = 60
MUTANT_TEST_SECONDS_MIN = 6
"""A guest that hangs fails its test after this long, or after `SLOWER` times the slowest healthy test."""
SLOWER = 3
SILENT_SECONDS_MAX = 60
"""A run that says nothing for longer is stuck where no test's own limit reaches it, and is ended."""
AFTER_FAILURE_SECONDS_MAX = 5
"""A core that ignores stop hangs the taking down after the failure; what matters is known by then."""

_POLL_SECONDS = 0.05


class SuiteError(Exception):
    """The run itself went wrong, so that it says nothing about the core."""


@dataclass
class Outcome:
    """What came of a run. ``failed``: the test that failed first; ``hung``: ended from outside, in this test."""

    seconds: float
    passed: list[str] = field(default_factory=list)
    failed: str | None = None
    phase: str = ""
    hung: str | None = None
    output: str = ""
    slowest: float = 0.0


def limit(healthy: Outcome) -> int:
    """Seconds that a test over a mutant may take, from a run over the core as it is."""
    return max(MUTANT_TEST_SECONDS_MIN, math.ceil(SLOWER * healthy.slowest))


def run(module: Path, tests: Iterable[str], test_seconds_max: int, deselect: Iterable[str] = ()) -> Outcome:
    """Run the native half of ``tests`` (paths or node ids) over ``module`` until the first failure.

    Raises `SuiteError` when pytest could not do so or another module was tested.
    """
    report, log = BUILD / "report.jsonl", BUILD / "output.txt"
    report.write_bytes(b"")
    env = {
        **os.environ,
        MODULE: str(module),
        REPORT: str(report),
        "PYTHONPATH": f"{module.parent}:{TREE / 'src'}:{TREE}",
    }
    options = ["-q", "-x", "-k", "native", f"--timeout={test_seconds_max}", "-p", "no:cacheprovider"]
    options += [f"--deselect={test}" for test in deselect]
    command = [sys.executable, "-m", "pytest", "-p", "tests.mutants.witness", *options, *tests]
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=TREE, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        ended = _follow(process, report)
    outcome = _read(report, time.monotonic() - started, ended)
    outcome.output = log.read_text(encoding="utf-8", errors="replace")
    _judge(outcome, process.returncode, module, _lines(report))
    return outcome


def _follow(process: subprocess.Popen[bytes], report: Path) -> bool:
    """Wait for the end; True when it had to be brought about."""
    size, heard = 0, time.monotonic()
    try:
        while process.poll() is None:
            if (now := report.stat().st_size) != size:
                size, heard = now, time.monotonic()
            failed = any("failed" in line for line in _lines(report))
            if time.monotonic() - heard > (AFTER_FAILURE_SECONDS_MAX if failed else SILENT_SECONDS_MAX):
                return True
            time.sleep(_POLL_SECONDS)
        return False
    finally:
        if process.poll() is None:
            _end(process, report)


def _end(process: subprocess.Popen[bytes], report: Path) -> None:
    """Kill the whole group and remove its directories."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for root in {root for line in _lines(report) for root in line.get("roots", ())}:
        shutil.rmtree(root, ignore_errors=True)


def _lines(report: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def _read(report: Path, seconds: float, ended: bool) -> Outcome:
    outcome, current = Outcome(seconds), None
    for line in _lines(report):
        current = line.get("started", current)
        if "passed" in line:
            outcome.passed.append(line["passed"])
            outcome.slowest = max(outcome.slowest, line["seconds"])
        if "failed" in line and outcome.failed is None:
            outcome.failed, outcome.phase = line["failed"], line["phase"]
    outcome.hung = current if ended else None
    return outcome


def _judge(outcome: Outcome, code: int, module: Path, lines: list[dict[str, Any]]) -> None:
    if {line["module"] for line in lines if "module" in line} != {str(module)}:
        raise SuiteError(f"{module} was not tested:\n{outcome.output}")
    if outcome.hung:
        return
    if code not in (0, 1) or (code == 1) != (outcome.failed is not None) or not (outcome.failed or outcome.passed):
        raise SuiteError(f"pytest ended with {code}:\n{outcome.output}")
