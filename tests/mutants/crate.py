"""A copy of the core's crate: one sabotage applied to it, built in release as the shipped core is."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from setup.common import ROOT

from .table import Mutant

BUILD = ROOT / "build" / "mutants"
_SOURCES = Path("crates", "vmd-core", "src")


class StaleTableError(Exception):
    """A substitution does not match exactly once: the core has changed and the table has not."""


class BuildError(Exception):
    """The sabotaged core does not compile: it proves nothing about the tests."""


class Crate:
    """The copy, in ``build/mutants/tree``; the sources of the work tree are never touched."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._tree = BUILD / "tree"
        self._target = BUILD / "target"
        self._env = {**env, "CARGO_TARGET_DIR": str(self._target)}
        shutil.rmtree(self._tree, ignore_errors=True)
        shutil.copytree(ROOT / "crates" / "vmd-core", self._tree / "crates" / "vmd-core")
        for name in ("Cargo.toml", "Cargo.lock"):
            shutil.copy(ROOT / name, self._tree)

    def check(self, mutants: list[Mutant]) -> None:
        """Raises `StaleTableError` naming every mutant that does not match exactly once."""
        if stale := [line for mutant in mutants if (line := self._stale(mutant))]:
            raise StaleTableError("\n".join(stale))

    def build(self, mutant: Mutant | None) -> Path:
        """The module with ``mutant`` applied (None: as it is), alone in a folder of its own. Raises `BuildError`."""
        folder = BUILD / "modules" / (mutant.name if mutant else "as-it-is")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if mutant is None:
            self._cargo()
        else:
            self._build_with(mutant)
        return Path(shutil.copy(self._target / "release" / "libvmd_core.so", folder / "vmd_core.so"))

    def _build_with(self, mutant: Mutant) -> None:
        source = self._tree / _SOURCES / mutant.file
        text = source.read_text(encoding="utf-8")
        try:
            source.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            self._cargo()
        finally:
            source.write_text(text, encoding="utf-8")

    def _cargo(self) -> None:
        command = ["cargo", "build", "--release", "--locked", "--quiet", "--lib", "--features", "extension-module"]
        folder = self._tree / "crates" / "vmd-core"
        done = subprocess.run(command, cwd=folder, env=self._env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(done.stderr)

    def _stale(self, mutant: Mutant) -> str | None:
        source = self._tree / _SOURCES / mutant.file
        found = source.read_text(encoding="utf-8").count(mutant.old) if source.exists() else 0
        return None if found == 1 else f"{mutant.name}: found {found} times in {mutant.file}: {mutant.old!r}"


def digest(module: Path) -> str:
    """SHA-256 of a built module: a mutant that has the baseline's was not built."""
    return hashlib.sha256(module.read_bytes()).hexdigest()
