"""A copy of what is tested and of what tests it; in it one sabotage of the core, built in release as it is shipped."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from setup.common import ROOT

from .table import Mutant

BUILD = ROOT / "build" / "mutants"
TREE = BUILD / "tree"
"""Core, package and tests as they were when the hunt began: an edit meanwhile changes nothing in it."""

_SOURCES = Path("crates", "vmd-core", "src")


class StaleTableError(Exception):
    """A substitution does not match exactly once: the core has changed and the table has not."""


class BuildError(Exception):
    """The sabotaged core does not compile: it proves nothing about the tests."""


class Crate:
    """The copy, in ``build/mutants/tree``, of one moment of the work tree, which is never touched."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._target = BUILD / "target"
        self._env = {**env, "CARGO_TARGET_DIR": str(self._target)}
        shutil.rmtree(TREE, ignore_errors=True)
        ignore = shutil.ignore_patterns("__pycache__")
        # New times on all files: cargo would take a copy that keeps the old ones for built, and
        # what was built last is the last mutant of the run before.
        for name in ("crates/vmd-core", "src", "tests", "setup"):
            shutil.copytree(ROOT / name, TREE / name, ignore=ignore, copy_function=shutil.copyfile)
        for name in ("Cargo.toml", "Cargo.lock", "pyproject.toml"):
            shutil.copyfile(ROOT / name, TREE / name)

    def check(self, mutants: list[Mutant]) -> None:
        """Raises `StaleTableError` naming every mutant that does not match exactly once."""
        if stale := [line for mutant in mutants if (line := self._stale(mutant))]:
            raise StaleTableError("\n".join(stale))

    def build(self, mutant: Mutant | None) -> Path:
        """The module with ``mutant`` applied (None: as it is), alone in a folder of its own. Raises `BuildError`.

        Gives way to what runs beside it: the next mutant is built while one is hunted.
        """
        folder = BUILD / "modules" / (mutant.name if mutant else "as-it-is")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if mutant is None:
            self._cargo()
        else:
            self._build_with(mutant)
        return Path(shutil.copy(self._target / "release" / "libvmd_core.so", folder / "vmd_core.so"))

    def _build_with(self, mutant: Mutant) -> None:
        source = TREE / _SOURCES / mutant.file
        text = source.read_text(encoding="utf-8")
        try:
            source.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            self._cargo()
        finally:
            source.write_text(text, encoding="utf-8")

    def _cargo(self) -> None:
        command = [
            "nice",
            "cargo",
            "build",
            "--release",
            "--locked",
            "--quiet",
            "--lib",
            "--features",
            "extension-module",
        ]
        folder = TREE / "crates" / "vmd-core"
        done = subprocess.run(command, cwd=folder, env=self._env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(done.stderr)

    def _stale(self, mutant: Mutant) -> str | None:
        source = TREE / _SOURCES / mutant.file
        found = source.read_text(encoding="utf-8").count(mutant.old) if source.exists() else 0
        return None if found == 1 else f"{mutant.name}: found {found} times in {mutant.file}: {mutant.old!r}"


def digest(module: Path) -> str:
    """SHA-256 of a built module: a mutant that has the baseline's was not built."""
    return hashlib.sha256(module.read_bytes()).hexdigest()
