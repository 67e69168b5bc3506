"""`vmd create`, `ls`, `inspect`, `exec`, `kill`: sandboxes, without a daemon."""

from __future__ import annotations

import asyncio
import time

import click

from .. import limits, sandbox
from ..backend import Asked
from ..errors import Conflict, NotFound, TimedOut, UsageError, VmdError
from ..sandbox import Sandbox
from .common import age, begin, emit, json_option, table, wait, warn

TIMED_OUT, OWN_FAILURE = 124, 125


@click.command()
@click.argument("template")
@click.option(
    "--backend",
    type=click.Choice(["auto", "uffd", "file"]),
    default="auto",
    show_default=True,
    help="Where guest memory comes from: userfaultfd, or Firecracker's own mapping of the file.",
)
@json_option  # fmt: skip
def create(template: str, backend: Asked, as_json: bool) -> None:
    """Create a sandbox from TEMPLATE; prints its id when the guest answers."""
    made = wait(sandbox.create(begin(), template, backend=backend, detached=True, warn=warn))
    if as_json:
        emit(made.describe())
        return
    click.echo(made.id)
    record = made.record
    click.echo(
        f"vmd: ready in {record.timings_ms['total']:.0f} ms, {record.backend} ({record.backend_reason})", err=True
    )


@click.command()
@json_option
def ls(as_json: bool) -> None:
    """List sandboxes: running, frozen (page server gone), dead (VMM gone)."""
    found = [one.describe() for one in sandbox.list_all(begin(), warn)]
    if as_json:
        emit(found)
        return
    rows = [
        (one["id"], one["state"], one["template"], one["backend"], str(one["vmm_pid"]), age(one["created_at"]))
        for one in found
    ]
    click.echo(table(("ID", "STATE", "TEMPLATE", "BACKEND", "VMM", "AGE"), rows))


@click.command()
@click.argument("sandbox_id", metavar="ID")
@json_option
def inspect(sandbox_id: str, as_json: bool) -> None:
    """All about one sandbox, its page server's statistics included."""
    found = sandbox.find(begin(), sandbox_id)
    content = {**found.describe(), "directory": found.record.directory, "pages": found.stats()}
    if as_json:
        emit(content)
        return
    for key, value in content.items():
        click.echo(f"{key}: {value}")


@click.command(name="exec")
@click.argument("sandbox_id", metavar="ID")
@click.argument("command", nargs=-1, required=True, metavar="CMD...")
@click.option(
    "--timeout",
    "seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=limits.EXEC_SECONDS,
    show_default=True,
    metavar="S",
    help="Seconds to wait for the answer.",
)
@json_option
@click.pass_context
def exec_(ctx: click.Context, sandbox_id: str, command: tuple[str, ...], seconds: float, as_json: bool) -> None:
    """Send one command line to the guest's console and print its answer.

    Put -- before a command that has options of its own.

    \b
    Exit codes:
      0    the guest answered
      1    the guest answered with an error
      124  no answer in time
      125  vmd failed
    """  # fmt: skip
    found = sandbox.find(begin(), sandbox_id)
    began = time.monotonic()
    try:
        answer = wait(found.ask(" ".join(command), seconds))
    except (UsageError, NotFound, Conflict):
        raise  # nothing was run: these keep their codes
    except VmdError as failure:
        failure.exit_code = TIMED_OUT if isinstance(failure, TimedOut) else OWN_FAILURE
        raise
    if as_json:
        emit({"id": found.id, "answer": answer, "ms": round((time.monotonic() - began) * 1000, 3)})
    else:
        click.echo(answer)
    ctx.exit(1 if answer.startswith("error") else 0)


@click.command()
@click.argument("ids", nargs=-1, metavar="ID...")
@click.option("--all", "every", is_flag=True, help="Kill all sandboxes.")
@json_option
def kill(ids: tuple[str, ...], every: bool, as_json: bool) -> None:
    """End sandboxes: VMM, page server, files. Dead ones are cleaned up."""
    if bool(ids) == every:
        raise UsageError("kill: give ids, or --all")
    settings = begin()
    victims = sandbox.list_all(settings, warn) if every else [sandbox.find(settings, one) for one in ids]
    failures = wait(_kill_all(victims))
    killed = [victim.id for victim in victims if victim.id not in failures]
    if as_json:
        emit({"killed": killed})
    else:
        for one in killed:
            click.echo(one)
    for failure in failures.values():
        raise failure


async def _kill_all(victims: list[Sandbox]) -> dict[str, VmdError]:
    """Kill all of them, whatever becomes of one; the failures by id."""
    results = await asyncio.gather(*(victim.kill() for victim in victims), return_exceptions=True)
    failures = {}
    for victim, result in zip(victims, results, strict=True):
        if isinstance(result, VmdError):
            failures[victim.id] = result
        elif isinstance(result, BaseException):
            raise result
    return failures
