"""Inside a run: the module under test is the one that was built, and each result is written down at once.

A pytest plugin (``-p tests.mutants.witness``). ``MUTANTS_MODULE``: the module that must be tested.
``MUTANTS_REPORT``: a file that gets one JSON object a line, so that also a run that had to be ended
has said what it saw.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

MODULE = "MUTANTS_MODULE"
REPORT = "MUTANTS_REPORT"


class Witness:
    """Follows one run. Refuses it before the first test, and again at its end, if the module is another."""

    def __init__(self, module: Path, report: Path) -> None:
        self._module = module
        self._report = report
        self._check()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._say(failed=report.nodeid, phase=report.when)
        elif report.passed and report.when == "call" and "native" in report.nodeid:
            self._say(passed=report.nodeid, seconds=report.duration)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        roots = [str(Path(os.environ[name]).parent) for name in ("VMD_RUN_DIR", "VMD_STATE_DIR")]
        self._say(started=item.nodeid, roots=roots)

    def pytest_sessionfinish(self) -> None:
        self._check()
        self._say(finished=True)

    def _check(self) -> None:
        import vmd_core

        tested = Path(vmd_core.__file__)
        if not tested.samefile(self._module):
            raise pytest.UsageError(f"{tested} is tested, not {self._module}")
        self._say(module=str(tested))

    def _say(self, **words: object) -> None:
        with self._report.open("a", encoding="utf-8") as report:
            report.write(json.dumps(words) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Witness(Path(os.environ[MODULE]), Path(os.environ[REPORT])), "witness")
