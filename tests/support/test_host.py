import os

import pytest

from tests.support import host


@pytest.mark.parametrize(
    ("why", "cargo", "release", "excused"),
    [
        ("native core not built (No module)", None, "6.18.1", True),
        ("native core not built (No module)", "/usr/bin/cargo", "6.18.1", False),
        ("no UFFDIO_POISON before Linux 6.6", None, "6.1.0-28-amd64", True),
        ("no UFFDIO_POISON before Linux 6.6", None, "6.18.44", False),
        ("not today", None, "6.1.0", False),
    ],
)
def test_only_what_the_host_lacks_excuses_a_skip(
    why: str, cargo: str | None, release: str, excused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.shutil, "which", lambda tool: cargo)  # type: ignore[attr-defined]
    monkeypatch.setattr(host.os, "uname", lambda: os.uname_result(("Linux", "h", release, "v", "m")))  # type: ignore[attr-defined]
    assert host.excused(why) is excused
