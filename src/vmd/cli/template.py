"""`vmd template`: build, list, look at, remove."""

from __future__ import annotations

import click

from .. import template as templates
from ..template import Shape, Template
from .common import age, begin, emit, json_option, progress, table, wait, warn

_PAGE_SIZES = {"4K": 4096, "2M": 2 << 20}


@click.group()
def template() -> None:
    """What sandboxes are created from."""


@template.command()
@click.argument("name")
@click.option("--guest", default="micro", show_default=True, help="What to boot: the built-in guest.")
@click.option("--mem", "mem_mib", type=click.IntRange(min=2), required=True, metavar="MIB", help="Guest memory in MiB.")
@click.option(
    "--page-size",
    type=click.Choice(list(_PAGE_SIZES), case_sensitive=False),
    default="4K",
    show_default=True,
    help="2M needs huge pages that the host has reserved.",
)
@click.option(
    "--start",
    default="sweep",
    show_default=True,
    metavar="CMD",
    help="The start whose page touches are recorded: one command line of the guest.",
)
@json_option  # fmt: skip
def build(name: str, guest: str, mem_mib: int, page_size: str, start: str, as_json: bool) -> None:
    """Boot a guest, freeze it, and record which pages a start touches."""
    shape = Shape(mem_mib, _PAGE_SIZES[page_size], start, guest)
    with progress() as say:
        built = wait(templates.build(begin(), name, shape, warn=warn, progress=say))
    if as_json:
        emit(summary(built))
    else:
        click.echo(built.name)
        click.echo(f"vmd: {built.recorded_pages} pages recorded ({built.recording_ended})", err=True)


@template.command()
@json_option
def ls(as_json: bool) -> None:
    """List templates."""
    found = templates.list_all(begin(), warn)
    if as_json:
        emit([summary(one) for one in found])
        return
    rows = [
        (one.name, f"{one.shape.mem_mib}M", _page_word(one), str(one.recorded_pages), one.recording_ended,
         age(one.created_at))
        for one in found
    ]  # fmt: skip
    click.echo(table(("NAME", "MEMORY", "PAGE SIZE", "RECORDED", "ENDED", "AGE"), rows))


@template.command()
@click.argument("name")
@click.option("--verify", is_flag=True, help="Read the whole snapshot and compare its digests first.")
@json_option
def inspect(name: str, verify: bool, as_json: bool) -> None:
    """All about one template: its manifest, and where its files are."""
    found = templates.load(begin(), name)
    if verify:
        found.snapshot.verify()
    content = {**found.save(), "directory": str(found.directory), "snapshot_id": found.snapshot.snapshot_id}
    if as_json:
        emit(content)
        return
    for key, value in content.items():
        click.echo(f"{key}: {value}")


@template.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@json_option
def rm(names: tuple[str, ...], as_json: bool) -> None:
    """Remove templates. Sandboxes that run from them go on."""
    settings = begin()
    for name in names:
        templates.remove(settings, name)
        if not as_json:
            click.echo(name)
    if as_json:
        emit({"removed": list(names)})


def summary(found: Template) -> dict[str, object]:
    """The object that ``template build`` and ``ls`` print (interfaces.md)."""
    return {
        "name": found.name,
        "snapshot_id": found.snapshot.snapshot_id,
        "guest": found.shape.guest,
        "mem_mib": found.shape.mem_mib,
        "page_size": found.shape.page_size,
        "start": found.shape.start,
        "recorded_pages": found.recorded_pages,
        "recording_ended": found.recording_ended,
        "created_at": found.created_at,
    }


def _page_word(found: Template) -> str:
    return next(word for word, size in _PAGE_SIZES.items() if size == found.shape.page_size)
