"""What every test gets: private directories, a watch for leaks, and a host that is asked before it is used."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.support import leaks

pytest_plugins = ["tests.support.host", "tests.traceability.plugin"]

_KEPT = ("VMD_FIRECRACKER", "VMD_JAILER", "VMD_CORE")
"""Variables that choose what is tested; all others would change what the tests mean."""

_numbers = count(1)


def _memory_root() -> str:
    """Where run directories go: a tmpfs with a short path, since a socket's path has at most 107 bytes."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()


@pytest.fixture(scope="session", autouse=True)
def session_dirs() -> Iterator[tuple[Path, Path]]:
    """``(run root, state root)`` of this run; the environment points there also for fixtures of wider scope."""
    roots = Path(tempfile.mkdtemp(prefix="vmd-", dir=_memory_root())), Path(tempfile.mkdtemp(prefix="vmd-state-"))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("VMD_") and name not in _KEPT]:
            patch.delenv(name)
        for variable, root in zip(("VMD_RUN_DIR", "VMD_STATE_DIR"), roots, strict=True):
            (root / "session").mkdir()
            patch.setenv(variable, str(root / "session"))
        watch = leaks.Watch(*roots)
        yield roots
        left = watch.settle(watch.outside)
        watch.clean()
        for root in roots:
            shutil.rmtree(root, ignore_errors=True)
    assert not left, "left after the whole run:\n" + "\n".join(left)


@pytest.fixture(autouse=True)
def private_dirs(session_dirs: tuple[Path, Path]) -> Iterator[tuple[Path, Path]]:
    """``(run dir, state dir)`` of one test, set as ``VMD_RUN_DIR`` and ``VMD_STATE_DIR``.

    Ends with the check that the test left nothing. It is the first fixture of a test to be set up and so
    the last to be taken down; its own MonkeyPatch keeps what the test patches out of the check.
    """
    number = str(next(_numbers))
    run_dir, state_dir = (root / number for root in session_dirs)
    run_dir.mkdir()
    state_dir.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMD_RUN_DIR", str(run_dir))
        patch.setenv("VMD_STATE_DIR", str(state_dir))
        watch = leaks.Watch(run_dir, state_dir)
        yield run_dir, state_dir
        left = watch.settle(watch.leaks)
        watch.clean()
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.rmtree(state_dir, ignore_errors=True)
    assert not left, "left after the test:\n" + "\n".join(left)


@pytest.fixture
def run_dir(private_dirs: tuple[Path, Path]) -> Path:
    """The test's ``VMD_RUN_DIR``: empty, short, on a tmpfs where there is one."""
    return private_dirs[0]


@pytest.fixture
def state_dir(private_dirs: tuple[Path, Path]) -> Path:
    """The test's ``VMD_STATE_DIR``: empty, on a disk."""
    return private_dirs[1]
