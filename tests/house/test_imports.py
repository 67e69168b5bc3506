"""Imports point one way: down the flow, and never from the page server to the VMM."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from .tree import PACKAGE, name, syntax

LAYERS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        (
            {"errors", "limits", "states", "tasks"},
            {"host", "settings", "store"},
            {"guest", "pager", "pages", "recording", "slots", "snapshot", "vmm", "workingset"},
            {"backend"},
            {"restore"},
            {"template"},
            {"sandbox"},
            {"demo", "doctor", "plot"},
            {"cli", "daemon"},
            {"__main__"},
        ),
    )
)
"""From the bottom up. A module may import from the layers below its own."""

BESIDE = {
    "limits": {"errors"},
    "states": {"errors"},
    "store": {"settings"},
    "pages": {"recording", "workingset"},
    "pager": {"pages", "recording", "workingset"},
    "snapshot": {"guest", "vmm"},
    "vmm": {"host"},
    "workingset": {"recording"},
}
"""What a module may import from its own layer. ``pages`` never names ``vmm``: it serves any VMM."""

CLIENT_MAY = {"client", "errors", "wire"}
"""The SDK runs where no daemon is installed, so it knows the words of the wire and nothing else."""


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> list[str]:
    """``['pages', 'server']`` for ``pages/server.py``; a package is its ``__init__``."""
    return list(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> Iterator[tuple[ast.stmt, list[str]]]:
    """Each import of our own in ``path``, lazy ones too: the statement and what it names, from the package root."""
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = dotted(path)[: -node.level] if node.level else []
            elif (node.module or "").split(".")[0] == "vmd":
                base = []
            else:
                continue
            words = (node.module or "").split(".") if node.module else []
            base = base + (words if node.level else words[1:])
            for alias in node.names:
                yield node, [*base, alias.name]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vmd":
                    yield node, alias.name.split(".")[1:]


def layer(stem: str) -> int:
    for number, stems in enumerate(LAYERS):
        if stem in stems:
            return number
    raise AssertionError(f"{stem} has no layer yet: add it to LAYERS in tests/house/test_imports.py")


def allowed(importer: str, imported: str) -> bool:
    if importer == "client" or imported == "client":
        return imported in CLIENT_MAY or (importer in {"client", "cli"} and imported == "client")
    if importer == imported or imported in BESIDE.get(importer, ()):
        return True
    return layer(imported) < layer(importer)


@pytest.mark.parametrize("path", modules(), ids=name)
def test_imports_point_down(path: Path) -> None:
    importer = dotted(path)[0]
    if importer == "__init__":
        return  # the map of the package names what it likes
    for statement, target in imports(path):
        imported = target[0]
        if (PACKAGE / imported).is_dir() or (PACKAGE / f"{imported}.py").exists():
            assert allowed(importer, imported), f"{name(path)}:{statement.lineno}: {importer} may not import {imported}"


def eager(path: Path) -> set[Path]:
    """The modules of ours that ``path`` imports when it is itself imported."""
    top = {id(node) for node in ast.iter_child_nodes(syntax(path))}
    found = set()
    for statement, target in imports(path):
        if id(statement) in top:
            for parts in (target, target[:-1]):
                file = PACKAGE.joinpath(*parts).with_suffix(".py") if parts else PACKAGE / "__init__.py"
                file = file if file.exists() else PACKAGE.joinpath(*parts, "__init__.py")
                if file.exists():
                    found.add(file)
                    break
    return found - {path}


def test_no_two_modules_wait_for_each_other() -> None:
    graph = {path: eager(path) for path in modules()}
    while leaves := [path for path, needs in graph.items() if not needs & graph.keys()]:
        for path in leaves:
            del graph[path]
    assert not graph, "import cycle among " + ", ".join(map(name, graph))


def test_the_rule_itself_can_fail() -> None:
    assert not allowed("pages", "vmm")
    assert not allowed("recording", "restore")
    assert not allowed("client", "settings")
    assert allowed("cli", "client")
    assert allowed("pages", "recording")
