"""`vmd recording`: the pages that a template's start touches."""

from __future__ import annotations

from pathlib import Path

import click

from .. import recording as recordings
from .. import template as templates
from ..errors import NotFound
from ..recording import Recording
from .common import begin, emit, json_option


@click.group()
def recording() -> None:
    """Which pages a start touched, in which order."""


@recording.command()
@click.argument("template")
@json_option
def show(template: str, as_json: bool) -> None:
    """The recording of TEMPLATE: what it says of itself, and its offsets, one a line."""
    found = _read(template)
    head = {
        "template": template,
        "snapshot": found.snapshot,
        "memory": found.memory,
        "page_size": found.page_size,
        "pages": len(found.offsets),
        "ended": found.ended,
        "skipped": found.skipped,
        "faults_per_tick": list(found.faults_per_tick),
    }
    if as_json:
        emit({**head, "offsets": list(found.offsets)})
        return
    for key, value in head.items():
        click.echo(f"# {key}: {value}")
    click.echo("".join(f"{offset}\n" for offset in found.offsets), nl=False)


@recording.command()
@click.argument("template")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the SVG here instead of stdout.",
)
@json_option  # fmt: skip
def plot(template: str, output: Path | None, as_json: bool) -> None:
    """Draw the recording of TEMPLATE as SVG: address over rank, fault rate, where it settled."""
    from ..plot import plot_recording

    drawn = plot_recording(_read(template))
    if output is not None:
        output.write_text(drawn, encoding="utf-8")
    if as_json:
        emit({"template": template, "file": str(output)} if output else {"template": template, "svg": drawn})
    elif output is not None:
        click.echo(str(output))
    else:
        click.echo(drawn)


def _read(name: str) -> Recording:
    found = templates.load(begin(), name)
    if not found.access_log.exists():
        raise NotFound(f"template {name} has no recording ({found.recording_ended})")
    return recordings.read_access_log(found.access_log, found.snapshot.memory_bytes)
