"""The watch sees what it is for: each test leaks one thing on purpose, looks, and cleans up."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support import leaks
from tests.support.leaks import Watch


@pytest.fixture
def watch(run_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(leaks, "GRACE_SECONDS", 0.05)
    return Watch(run_dir, state_dir)


def test_nothing_left_is_seen_at_once(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited though nothing was left"))
    assert watch.settle(watch.leaks) == []


def test_a_descriptor_is_named_by_its_kind(watch: Watch) -> None:
    with socket.socket(), Path("/dev/zero").open("rb"):
        assert sorted(watch.settle(watch.leaks)) == ["1 x descriptor /dev/zero", "1 x descriptor socket"]


def test_a_thread_is_seen_until_it_ends(watch: Watch) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert [line.split()[0] for line in watch.settle(watch.leaks)] == ["thread"]
    finally:
        end.set()
        thread.join()


def test_a_detached_process_is_found_by_the_private_directory(watch: Watch, run_dir: Path) -> None:
    # The middle process ends at once, so the sleeper belongs to nobody: only its environment tells.
    middle = (
        "import subprocess; null = subprocess.DEVNULL;"
        "print(subprocess.Popen(['sleep', '60'], stdout=null, stderr=null).pid)"
    )
    done = subprocess.run([sys.executable, "-I", "-c", middle], capture_output=True, text=True, check=True)
    assert watch.settle(watch.leaks) == [f"process {int(done.stdout)} (sleep)"]
    watch.clean()
    assert watch.settle(watch.leaks) == []


def test_an_entry_of_the_run_directory_is_seen_and_a_lock_file_is_not(watch: Watch, run_dir: Path) -> None:
    (run_dir / "a").mkdir()
    (run_dir / "store.lock").touch()
    os.mkfifo(run_dir / "a" / "fifo")
    assert watch.settle(watch.leaks) == [f"{run_dir}/a/fifo"]
    (run_dir / "a" / "fifo").unlink()
