"""`vmd doctor`: what this host can do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

import click

from ..doctor.checks import Check, examine
from ..settings import Settings
from .common import emit, json_option, table, wait


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Try what vmd needs on this host: run a guest, serve a fault, take one over, and more.

    Exit code 1 when something is missing that vmd cannot do without. What it can do without is a
    warning: ok, with a fix.
    """
    checks = wait(examine(Settings.read()))
    ok = all(check.ok for check in checks)
    if as_json:
        emit({"ok": ok, "checks": [asdict(check) for check in checks]})
    elif sys.stdout.isatty():
        _show(checks)
    else:
        click.echo(table(("CHECK", "RESULT", "DETAIL", "FIX"), _rows(checks)))
    return 0 if ok else 1


def _rows(checks: Sequence[Check]) -> list[tuple[str, str, str, str]]:
    return [(check.name, _result(check), check.detail, check.fix or "") for check in checks]


def _result(check: Check) -> str:
    return "warning" if check.warns else "ok" if check.ok else "FAILED"


def _show(checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "FAILED": "bold red"}
    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.add_column("CHECK", no_wrap=True)
    shown.add_column("RESULT", no_wrap=True)
    shown.add_column("DETAIL", overflow="fold")
    for name, result, detail, fix in _rows(checks):
        words = Text(detail)
        if fix:
            words.append(f"\n→ {fix}", style="dim")
        shown.add_row(name, Text(result, style=colours[result]), words)
    Console().print(shown)
