"""Who owns a directory, and what becomes of it when the owner dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from vmd.errors import Conflict, VmdError
from vmd.settings import Settings
from vmd.store import OWNER, RECORD, Registry, is_dead, read_json, runs, sweep_runs, write_json

OWN = """
import sys, time
from pathlib import Path
from vmd.store import Registry
registry = Registry(Path(sys.argv[1]))
with registry.locked():
    owned = registry.own("sb-abcdefghij")
print("owned", flush=True)
time.sleep(60)
"""

NAME = "sb-abcdefghij"

VMM = [sys.executable, "-c", "import time; time.sleep(60)", "--api-sock", "api.sock"]


def test_an_owner_lives_as_long_as_it_does(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    with registry.locked():
        owned = registry.own("mine")
    (owned.path / "made").touch()
    assert not is_dead(owned.path)
    with pytest.raises(Conflict, match="exists"):
        registry.own("mine")
    owned.disown()
    assert owned.path.is_dir()
    assert not (owned.path / OWNER).exists()
    assert not is_dead(owned.path)
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
        directory = run_dir / NAME
        settings = Settings.read()
        assert sweep_runs(settings) == []
        with (
            subprocess.Popen(VMM, cwd=directory) as works_there,
            subprocess.Popen(VMM, cwd=run_dir) as works_elsewhere,
            subprocess.Popen(["sleep", "60"], cwd=directory) as somebodys_shell,
        ):
            eventually(lambda: Path(f"/proc/{works_there.pid}/cmdline").read_bytes(), "it has its arguments")
            owner.kill()
            owner.wait()
            assert is_dead(directory)
            assert sweep_runs(settings) == [directory]
            assert works_there.wait(5) == -signal.SIGKILL
            assert works_elsewhere.poll() is None
            assert somebodys_shell.poll() is None
            works_elsewhere.kill()
            somebodys_shell.kill()
    assert list(run_dir.iterdir()) == []


def test_what_was_recorded_is_complete(run_dir: Path, state_dir: Path) -> None:
    directory = run_dir / NAME
    directory.mkdir()
    (directory / OWNER).touch()
    home = state_dir / "sandboxes" / NAME
    home.mkdir(parents=True)
    (home / RECORD).write_text("{}")
    assert sweep_runs(Settings.read()) == [directory]
    assert directory.is_dir()
    assert not (directory / OWNER).exists()


def test_only_what_vmd_names_so_is_swept(run_dir: Path, state_dir: Path) -> None:
    for name in ("src", "sb-short", "sb-ABCDEFGHIJ", "sb-abcdefghij.old", "builds"):
        (run_dir / name).mkdir()
        (run_dir / name / OWNER).touch()
    for name in ("build-output", NAME):  # ours by name; but not empty, and nobody's
        (run_dir / name).mkdir()
        (run_dir / name / "file").touch()
    before = sorted(run_dir.rglob("*"))
    assert sweep_runs(Settings.read()) == []
    assert sorted(run_dir.rglob("*")) == before
    shutil.rmtree(run_dir)
    run_dir.mkdir()


def test_a_maker_killed_before_it_owns_the_directory_is_swept(
    run_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.read()

    def killed(self: Registry, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, runs(settings).locked():
        patch.setattr(Registry, "take", killed)
        with pytest.raises(KeyboardInterrupt):
            runs(settings).own(NAME)
    assert sweep_runs(settings) == [run_dir / NAME]
    assert list(run_dir.iterdir()) == []


def test_a_discard_killed_at_any_moment_is_swept(
    run_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.read()
    real = Path.unlink
    for moment in range(5):
        with runs(settings).locked():
            owned = runs(settings).own(NAME)
        for name in ("api.sock", "pages.json", "zz"):
            (owned.path / name).touch()
        left = iter(range(moment))

        def unlink(path: Path, missing_ok: bool = False, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(path, missing_ok)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            patch.setattr(Path, "rmdir", unlink)
            with pytest.raises(KeyboardInterrupt):
                owned.discard()
        os.close(owned._fd)  # the kernel, when it ends the process
        assert sweep_runs(settings) == [run_dir / NAME], f"killed after {moment} steps"
        assert list(run_dir.iterdir()) == []


def test_the_page_server_of_a_directory_is_known_in_any_spelling(
    run_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = run_dir / 'größe "q"'
    monkeypatch.setenv("VMD_RUN_DIR", str(odd))
    settings = Settings.read()
    with runs(settings).locked():
        owned = runs(settings).own(NAME)
    order = {"socket": "x", "directory": str(owned.path)}
    words = [sys.executable, "-c", "import time; time.sleep(60)", "vmd.pages.detached", json.dumps(order)]
    with subprocess.Popen(words) as server:
        eventually(lambda: Path(f"/proc/{server.pid}/cmdline").read_bytes(), "it has its arguments")
        os.close(owned._fd)
        assert sweep_runs(settings) == [owned.path]
        assert server.wait(5) == -signal.SIGKILL
    odd.rmdir()


def test_a_vmm_is_known_through_a_link(run_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "real").mkdir()
    (run_dir / "link").symlink_to("real")
    monkeypatch.setenv("VMD_RUN_DIR", str(run_dir / "link"))
    settings = Settings.read()
    with runs(settings).locked():
        owned = runs(settings).own(NAME)
    with subprocess.Popen(VMM, cwd=owned.path) as vmm:
        eventually(lambda: Path(f"/proc/{vmm.pid}/cmdline").read_bytes(), "it has its arguments")
        os.close(owned._fd)
        assert len(sweep_runs(settings)) == 1
        assert vmm.wait(5) == -signal.SIGKILL
    (run_dir / "link").unlink()


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
