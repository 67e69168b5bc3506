"""Whose the directories are that vmd keeps its records in, and who can hold it up."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmd import limits, sandbox
from vmd import template as templates
from vmd.errors import TimedOut, VmdError
from vmd.settings import Settings
from vmd.store import Registry, private_directory, require_private, sweep_runs

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_all_that_is_made_is_private(tmp_path: Path) -> None:
    assert not require_private(tmp_path / "a")
    private_directory(tmp_path / "a" / "b" / "c")
    private_directory(tmp_path / "a" / "b" / "c")
    assert [mode(tmp_path / part) for part in ("a", "a/b", "a/b/c")] == [0o700] * 3


def test_one_that_others_can_read_is_good_enough(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    private_directory(tmp_path)


@pytest.mark.parametrize("wrong", [0o777, 0o1777, 0o775, 0o702])
def test_one_that_others_can_write_to_is_refused(wrong: int, tmp_path: Path) -> None:
    tmp_path.chmod(wrong)
    with pytest.raises(VmdError, match=f"^{tmp_path} can be written by others") as refused:
        private_directory(tmp_path)
    assert refused.value.hint == f"chmod go-w {tmp_path}"


@as_root
def test_one_of_somebody_else_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(VmdError, match=f"^{tmp_path} belongs to uid 65534, not to uid 0") as refused:
        private_directory(tmp_path)
    assert "VMD_RUN_DIR" in (refused.value.hint or "")


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(VmdError, match=f"/{name} is no directory"):
            private_directory(tmp_path / name)
    with pytest.raises(VmdError, match=r"^create .*/file/x: Not a directory"):
        private_directory(tmp_path / "file" / "x")


@pytest.mark.parametrize("which", [".", "templates", "sandboxes"])
def test_nothing_is_read_that_others_may_have_written(which: str, run_dir: Path, state_dir: Path) -> None:
    settings = Settings.read()
    wrong = state_dir / which
    wrong.mkdir(exist_ok=True)
    wrong.chmod(0o777)
    refused = 0
    for read in (
        lambda: sandbox.list_all(settings),
        lambda: sandbox.find(settings, "sb-"),
        lambda: templates.load(settings, "x"),
        lambda: templates.list_all(settings),
        lambda: templates.sweep(settings),
    ):
        try:
            read()
        except VmdError as failure:
            refused += "can be written by others" in str(failure)
    assert refused == {".": 5, "templates": 3, "sandboxes": 2}[which]


def test_no_run_directory_is_swept_that_others_may_have_made(run_dir: Path, state_dir: Path) -> None:
    run_dir.chmod(0o777)
    with pytest.raises(VmdError, match="can be written by others"):
        sweep_runs(Settings.read())


# --- the lock --------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Somebody holds the lock of ``tmp_path``; a descriptor of it."""
    monkeypatch.setattr(limits, "STORE_LOCK_SECONDS", 0.2)
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield fd
    os.close(fd)


def test_a_lock_that_is_never_given_back_is_told_of(held: int, tmp_path: Path) -> None:
    began = time.monotonic()
    words = r"^lock .*: another process has held it for 0\.2 s"
    with pytest.raises(TimedOut, match=words) as late, Registry(tmp_path).locked():
        raise AssertionError("locked twice")
    assert 0.2 <= time.monotonic() - began < 2
    assert f"chmod 700 {tmp_path}" in (late.value.hint or "")


def test_a_lock_that_is_given_back_is_taken(held: int, tmp_path: Path) -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, fcntl.flock, held, fcntl.LOCK_UN)  # by this very loop: it is free
        async with Registry(tmp_path).locked_async():
            pass

    asyncio.run(story())


def test_who_waits_for_a_lock_can_be_cancelled_at_once(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "STORE_LOCK_SECONDS", 60.0)

    async def story() -> float:
        async def wait() -> None:
            async with Registry(tmp_path).locked_async():
                raise AssertionError("locked twice")

        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0.05)
        began = time.monotonic()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return time.monotonic() - began

    assert asyncio.run(story()) < 1
