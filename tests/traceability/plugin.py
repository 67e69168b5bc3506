"""The accounting of a run, printed before pytest's closing line: checks that hold, skips and their reasons.

A gap fails the run, but only a run of the whole suite: one test by name proves nothing about the rest.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter

from tests.support.host import HOST_SKIPS

from .ledger import Ledger, read_list

_HERE = Path(__file__).parent
_NARROWING = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf", "collectonly")

HOUSE_LINES = pytest.StashKey[list[str]]()
"""Lines that tests add to the closing summary, such as the measured house numbers."""


class Accounting:
    """Follows the tests of one run and speaks at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._ledger = Ledger(read_list(_HERE / "checks.txt"), read_list(_HERE / "not_due.txt"))
        self._gaps: list[str] = []

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("seed"):
                self._ledger.carry(item.nodeid, mark.args)

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # in any phase: a test that leaks fails in its teardown
            self._ledger.failed.add(report.nodeid)
        elif report.passed and report.when == "call" and not hasattr(report, "wasxfail"):
            self._ledger.passed.add(report.nodeid)

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._ledger.host_skipped = self._config.stash[HOST_SKIPS]
        if self._whole(session):
            self._gaps = self._ledger.gaps()
            if self._gaps and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> None:
        terminalreporter.section("accounts")
        for line in self._config.stash[HOUSE_LINES]:
            terminalreporter.line(line)
        terminalreporter.line(_skip_line(terminalreporter))
        terminalreporter.line(self._ledger.summary())
        for gap in self._gaps:
            terminalreporter.line(f"GAP {gap}", red=True)
        if self._gaps:
            terminalreporter.line(f"the run fails for {len(self._gaps)} gap(s) in the checks", red=True)

    def _whole(self, session: pytest.Session) -> bool:
        """True when nothing narrowed the run and it came to its end."""
        tests = str(self._config.rootpath / "tests")
        given = {str((self._config.invocation_params.dir / arg).resolve()) for arg in self._config.args}
        narrowed = any(self._config.getoption(name, None) for name in _NARROWING)
        return given == {tests} and not narrowed and not session.shouldstop and not session.shouldfail


def pytest_configure(config: pytest.Config) -> None:
    config.stash[HOUSE_LINES] = []
    config.pluginmanager.register(Accounting(config), "accounting")


def _skip_line(reporter: TerminalReporter) -> str:
    """How many tests were skipped and why, in one line."""
    reasons: Counter[str] = Counter()
    for report in reporter.stats.get("skipped", []):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[why.removeprefix("Skipped: ")] += 1
    words = "; ".join(f"{n} x {why}" for why, n in reasons.most_common())
    return f"skipped: {reasons.total()}" + (f" ({words})" if words else "")
