"""What a stranger finds: a licence, documented names, and nothing that holds on one machine only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from .tree import PACKAGE, ROOT, files, name, syntax

HOSTS = {
    "github.com",
    "www.apache.org",
    "www.kernel.org",
    "docs.kernel.org",
    "keepachangelog.com",
    "semver.org",
    "json-schema.org",
    "www.w3.org",
    "localhost",
}
"""Hosts that the tree may name. Registries are reached by their clients, which know where they are."""

# Homes and work trees: such a path was pasted from somebody's machine.
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:root|home|Users|mnt|work|workspaces?|builds)/[\w.]")
URL = re.compile(r"\b(?:https?|ftp|git|ssh|wss?)://([\w.-]+)")
REGISTRY = re.compile(
    r"\b(?:[\w-]+\.)*(?:pypi|pythonhosted|crates|npmjs|debian|ubuntu|maven)\.(?:org|io|com|net)\b", re.IGNORECASE
)
GENERATED = {"Cargo.lock"}


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in files():
        if path.name not in GENERATED and b"\0" not in (body := path.read_bytes()):
            found.append((path, body.decode("utf-8", errors="replace")))
    return found


def test_no_path_of_a_machine() -> None:
    wrong = [f"{name(path)}: {found[0]}" for path, text in texts() if (found := MACHINE_PATH.search(text))]
    assert not wrong


def test_no_host_but_known_ones() -> None:
    wrong = [
        f"{name(path)}: {host}"
        for path, text in texts()
        for host in [*URL.findall(text), *REGISTRY.findall(text)]
        if host.lower() not in HOSTS
    ]
    assert not wrong


def test_the_rules_of_words_can_fail() -> None:
    assert MACHINE_PATH.search("see /" + "home/ann/x")
    assert not MACHINE_PATH.search("$XDG/work/x, ~/home/a")
    assert REGISTRY.search("files.pythonhosted" + ".org")


def test_the_licence_is_there() -> None:
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert "Apache License" in text
    assert "Version 2.0" in text


def test_public_names_are_documented() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = syntax(path)
        nodes: list[tuple[ast.AST, str]] = [(module, "the module")]
        nodes += [(node, node.name) for node in _public(module.body)]
        for node in _public(module.body):
            if isinstance(node, ast.ClassDef):
                nodes += [(member, f"{node.name}.{member.name}") for member in _public(node.body)]
        wrong += [
            f"{name(path)}: {words}"
            for node, words in nodes
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and not ast.get_docstring(node)
            and not _overrides(node)
        ]
    assert not wrong


def _public(body: list[ast.stmt]) -> list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def _overrides(node: ast.AST) -> bool:
    """``@override`` and the setter of a property are documented where they are declared."""
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(decorator).split(".")[-1] in {"override", "setter", "overload"} for decorator in decorators)
