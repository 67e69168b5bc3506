"""Who owns a directory, and what becomes of it when the owner dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vmd.errors import Conflict, VmdError
from vmd.settings import Settings
from vmd.store import OWNER, RECORD, Registry, owner_is_dead, read_json, sweep_runs, write_json

OWN = """
import sys, time
from pathlib import Path
from vmd.store import Registry
registry = Registry(Path(sys.argv[1]))
with registry.locked():
    owned = registry.own("mine")
print("owned", flush=True)
time.sleep(60)
"""


VMM = [sys.executable, "-c", "import time; time.sleep(60)", "--api-sock", "api.sock"]


def test_an_owner_lives_as_long_as_it_does(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    with registry.locked():
        owned = registry.own("mine")
    assert not owner_is_dead(owned.path)
    with pytest.raises(Conflict, match="exists"):
        registry.own("mine")
    owned.disown()
    assert owned.path.is_dir()
    assert not (owned.path / OWNER).exists()
    assert not owner_is_dead(owned.path)
    owned.discard()  # not its owner any more
    assert owned.path.is_dir()


def test_a_discarded_directory_is_gone(tmp_path: Path) -> None:
    owned = Registry(tmp_path).own("mine")
    (owned.path / "sub").mkdir()
    owned.discard()
    owned.discard()
    assert list(tmp_path.iterdir()) == []


def test_the_dead_are_swept_with_their_processes(run_dir: Path, state_dir: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWN, str(run_dir)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "owned\n"
        directory = run_dir / "mine"
        settings = Settings.read()
        assert sweep_runs(settings) == []
        with (
            subprocess.Popen(VMM, cwd=directory) as works_there,
            subprocess.Popen(VMM, cwd=run_dir) as works_elsewhere,
            subprocess.Popen(["sleep", "60"], cwd=directory) as somebodys_shell,
        ):
            owner.kill()
            owner.wait()
            assert owner_is_dead(directory)
            assert sweep_runs(settings) == [directory]
            assert works_there.wait(5) == -signal.SIGKILL
            assert works_elsewhere.poll() is None
            assert somebodys_shell.poll() is None
            works_elsewhere.kill()
            somebodys_shell.kill()
    assert list(run_dir.iterdir()) == []


def test_what_was_recorded_is_complete(run_dir: Path, state_dir: Path) -> None:
    directory = run_dir / "sb-x"
    directory.mkdir()
    (directory / OWNER).touch()
    home = state_dir / "sandboxes" / "sb-x"
    home.mkdir(parents=True)
    (home / RECORD).write_text("{}")
    assert sweep_runs(Settings.read()) == [directory]
    assert directory.is_dir()
    assert not (directory / OWNER).exists()


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path, "x") == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def test_json_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text, words in (("{", "not JSON"), (json.dumps([]), "expected an object"), ("\x00", "not JSON")):
        path.write_text(text)
        with pytest.raises(VmdError, match=f"^x: .*{words}"):
            read_json(path, "x")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing", "x")


def test_a_lock_is_not_inherited(tmp_path: Path) -> None:
    owned = Registry(tmp_path).own("mine")
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        owned.discard()
        assert not os.path.exists(owned.path)  # noqa: PTH110
        child.kill()
