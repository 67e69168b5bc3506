"""What this host can do, and the rule that a test which needs it may only be skipped aloud.

``@pytest.mark.needs_kvm`` and ``@pytest.mark.needs_uffd`` skip where the host lacks the device or
the right to it. As root on a host that has both, a skip of such a test is turned into a failure:
a suite that quietly stops testing page faults is worse than none. Only what the host verifiably lacks beside
them (Rust for the native core, a newer kernel) excuses it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest

_DEVICES = {"needs_kvm": "/dev/kvm", "needs_uffd": "/dev/userfaultfd"}

HOST_SKIPS = pytest.StashKey[set[str]]()
"""Node ids of tests that were skipped because of the host, for the accounting of checks."""


def lack(marker: str) -> str | None:
    """Why this host cannot run a test that carries ``marker``; None when it can."""
    device = _DEVICES[marker]
    if not Path(device).exists():
        return f"{device} is missing"
    if os.geteuid() != 0:
        return "needs root"
    return None


def host_is_complete() -> bool:
    """True as root on a host with KVM and userfaultfd: nothing has an excuse to be skipped."""
    return not any(lack(marker) for marker in _DEVICES)


def needed(item: pytest.Item) -> list[str]:
    """The ``needs_`` markers that ``item`` carries."""
    return [marker for marker in _DEVICES if item.get_closest_marker(marker)]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[HOST_SKIPS] = set()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    reasons = dict.fromkeys(reason for marker in needed(item) if (reason := lack(marker)))
    if reasons:
        item.config.stash[HOST_SKIPS].add(item.nodeid)
        pytest.skip(", ".join(reasons))


def excused(why: str) -> bool:
    """True when ``why`` names something that this host verifiably lacks: Rust, or a newer kernel."""
    if "native core not built" in why:
        return shutil.which("cargo") is None
    if newer := re.search(r"before Linux (\d+)\.(\d+)", why):
        running = re.match(r"(\d+)\.(\d+)", os.uname().release)
        return running is not None and tuple(map(int, running.groups())) < tuple(map(int, newer.groups()))
    return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # An expected failure is also reported as a skip, and is not one.
    if report.skipped and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if excused(why):
            item.config.stash[HOST_SKIPS].add(item.nodeid)
        elif needed(item) and host_is_complete():
            report.outcome = "failed"
            report.longrepr = f"skipped on a host that has all it needs: {why}"
    return report
