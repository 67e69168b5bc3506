"""The command line: one file a noun, loaded only when it is called for.

Data goes to stdout, words to stderr. An error is one line ``vmd: error: WHAT AND WHY [code]`` on stderr,
also under ``--json``, and a line ``vmd: hint: ...`` where a fix is known; the exit code is the error's own
(`errors`). ``vmd pages`` has exit codes of its own, 0 to 2, and one line without code.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from typing import Any, NoReturn

import click

from ..errors import VmdError
from ..pages.process import one_line, raise_descriptor_limit

INTERRUPTED, TERMINATED = 130, 143

# name: (module, its command, what `vmd --help` says of it); in the order of a first hour with vmd.
_COMMANDS = {
    "doctor": ("doctor", "doctor", "What this host can do, and the fix for what it cannot."),
    "demo": ("demo", "demo", "Freeze, record, restore, replay: measured on this host, every word checked."),
    "template": ("template", "template", "What sandboxes are created from."),
    "recording": ("recording", "recording", "Which pages a start touched, in which order."),
    "create": ("sandbox", "create", "Create a sandbox from a template."),
    "ls": ("sandbox", "ls", "List sandboxes."),
    "inspect": ("sandbox", "inspect", "All about one sandbox."),
    "exec": ("sandbox", "exec_", "Send a command to a sandbox's guest."),
    "kill": ("sandbox", "kill", "End sandboxes."),
    "pages": ("pages", "pages", "A page server for one VM of anybody's Firecracker."),
}


class _Lazy(click.Group):
    """A group that imports a command's module when it is asked for that command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[name]
        command: click.Command = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, _, words) in _COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vmd-sandbox", prog_name="vmd")
def vmd() -> None:
    """Firecracker sandboxes that start before their memory has arrived."""


def main() -> NoReturn:
    """Run the command line of this process (`vmd.__main__` is the entry point) and end it."""
    arguments = sys.argv[1:]
    if not _serves(arguments):  # a page server hears its signals by itself
        signal.signal(signal.SIGINT, signal.default_int_handler)
    raise_descriptor_limit()  # a page server takes some ten of them for each VM
    sys.exit(run(arguments))


def run(arguments: list[str]) -> int:
    """Run one command line; its exit code. Writes to stdout and stderr, raises only for bugs, under `pages` never."""
    serves = _serves(arguments)
    try:
        code = vmd.main(arguments, prog_name="vmd", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as failure:
        return _say_usage(failure, serves)
    except VmdError as failure:
        return _say(failure, serves)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has left: nothing more to say
        return 1
    except OSError as failure:
        _line(f"error: {failure.filename}: {failure.strerror}" if failure.filename else f"error: {failure}")
        return 1
    except (KeyboardInterrupt, click.Abort):
        _line("error: interrupted")
        return INTERRUPTED
    except Exception as failure:
        if not serves:
            raise
        _line(f"error: {failure!r}")
        return 1
    return code if isinstance(code, int) else 0


def _serves(arguments: list[str]) -> bool:
    return arguments[:1] == ["pages"]


def _say(failure: VmdError, serves: bool) -> int:
    if serves:
        _line(f"error: {failure}" + (f"; {failure.hint}" if failure.hint else ""))
        return 2 if failure.exit_code == 2 else 1
    _line(f"error: {failure} [{failure.code}]")
    if failure.hint:
        _line(f"hint: {failure.hint}")
    for note in getattr(failure, "__notes__", ()):
        _line(f"warning: {note}")
    return failure.exit_code


def _say_usage(failure: click.ClickException, serves: bool) -> int:
    context: Any = getattr(failure, "ctx", None)
    if isinstance(failure, click.exceptions.NoArgsIsHelpError):
        failure.show()
        return 2
    message = failure.format_message().replace("\n\t", " ")  # click lists the choices on lines of their own
    _line(f"error: {message}" + ("" if serves else " [usage]"))
    if context is not None and not serves:
        _line(f"hint: {context.command_path} --help")
    return 2


def _line(text: str) -> None:
    if sys.stderr is not None:  # closed: nobody is told, and stdout is for data
        with contextlib.suppress(OSError):  # nobody reads
            print(f"vmd: {one_line(text)}", file=sys.stderr, flush=True)
