"""`vmd pages`: a page server for one VM, usable with any Firecracker."""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import click

from ..errors import UsageError, VmdError
from ..pages.contract import Beside, Ended, EndReason, Service
from ..pages.server import PageServer, serve_pages
from ..pages.serving import Serving, exit_line
from ..pages.source import Image
from ..recording import Recording, offsets_for, read_access_log, refusal, write_access_log
from ..settings import Settings


@click.group()
def pages() -> None:
    """Serve the memory of a VM page by page, with any Firecracker."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _warn(line: str) -> None:
    _say(f"vmd: warning: {line}")


def _parse_owner(_: click.Context, __: click.Parameter, word: str | None) -> tuple[int, int] | None:
    if word is None:
        return None
    uid, _colon, gid = word.partition(":")
    if not (uid.isdecimal() and gid.isdecimal()):
        raise click.BadParameter(f"expected UID:GID as numbers, got {word!r}")
    return int(uid), int(gid)


@pages.command()
@click.option(
    "--socket",
    "socket_path",
    required=True,
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Listen here for the VMM, mode 0600. A stale socket is replaced, a live one refused.",
)
@click.option(
    "--memory",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The snapshot's memory file. Read lazily; never written.",
)
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    metavar="ACCESS_LOG",
    help="Log the demand-faulted pages in first-touch order; written when the VMM has gone or at SIGTERM.",
)
@click.option(
    "--replay",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Install the pages of this access.log, in its order, beside the demand faults.",
)
@click.option("--no-prefetch", is_flag=True, help="Install exactly the touched pages, nothing around them.")
@click.option("--journal", type=click.Path(path_type=Path), metavar="FILE", help="Not yet supported: refused.")
@click.option(
    "--stats",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep statistics in this JSON file: every 200 ms, at the end, and on SIGUSR1.",
)
@click.option(
    "--owner",
    callback=_parse_owner,
    metavar="UID:GID",
    help="Give the socket to this user and group, for a jailed VMM.",
)
@click.option("--accept-timeout", type=click.FloatRange(min=0, min_open=True), metavar="S",
              help="Seconds to wait for a good handshake. Default: no limit.")  # fmt: skip
def serve(
    socket_path: Path,
    memory: Path,
    record: Path | None,
    replay: Path | None,
    no_prefetch: bool,
    journal: Path | None,
    stats: Path | None,
    owner: tuple[int, int] | None,
    accept_timeout: float | None,
) -> NoReturn:
    """Serve one VM: the first VMM that connects with a good handshake; end with it.

    Prints `ready` when it listens. Then load the snapshot with mem_backend
    {"backend_type": "Uffd", "backend_path": PATH}.

    Demand faults are always served. Beside them: with --replay the recorded pages, with
    --no-prefetch and --record nothing, with none of the three the whole memory sequentially
    (bounded by VMD_PREFETCH_MAX_BYTES, default 1 GiB, and by free memory).

    \b
    Exit codes:
      0  the VMM has exited, or SIGTERM or SIGINT ended the serving
      1  anything else, with one line on stderr that names what and why
      2  usage
    """
    if journal is not None:
        raise UsageError("--journal: not supported yet", hint="serve without it; a VM whose server dies stays frozen")
    if sum((record is not None, replay is not None, no_prefetch)) > 1:
        raise UsageError("--record, --replay and --no-prefetch exclude each other")
    settings = Settings.read()
    identity = _check_record(record, memory)
    service = _service(memory, replay, record, no_prefetch, settings)
    server = serve_pages(
        socket_path, memory, service, owner=owner, core=settings.core, accept_seconds=accept_timeout, warn=_warn
    )
    ended = _serve_ready(server, stats)
    if record is not None:
        _write_record(record, identity, server, ended)
    _leave(server, ended)


@pages.command(context_settings={"ignore_unknown_options": True})
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def adopt(options: tuple[str, ...]) -> NoReturn:
    """Take over a VM whose page server is gone. Not supported yet: refused."""
    raise UsageError("pages adopt: not supported yet", hint="kill the VM and create it again")


def _check_record(record: Path | None, memory: Path) -> str:
    """The identity of what will be recorded; a recording must not be lost for a typo in the end."""
    if record is None:
        return ""
    if not os.access(record.absolute().parent, os.W_OK):
        raise VmdError(f"record {record}: the directory does not exist or cannot be written")
    return _identity(memory)


def _serve_ready(server: PageServer, stats: Path | None) -> Ended:
    serving = Serving(server, say=_say, stats_path=stats)
    serving.write_stats()
    print("ready", flush=True)
    return serving.run()


def _service(
    memory: Path, replay: Path | None, record: Path | None, no_prefetch: bool, settings: Settings
) -> Callable[[int], Service]:
    """What to do beside demand, once the guest's page size is known."""
    if record is not None:
        return lambda _: Service(Beside.RECORD)
    if no_prefetch:
        return lambda _: Service(Beside.NOTHING)
    if replay is None:
        return lambda _: Service(Beside.SEQUENTIAL, prefetch_bytes_max=settings.prefetch_bytes_max)
    memory_bytes = _image_bytes(memory)
    try:
        recording = _read_recording(memory, memory_bytes, replay)
    except VmdError as failure:
        refused = str(failure)
        _warn(f"{refused}; serving without replay")
        return lambda _: Service(Beside.NOTHING, refused=refused)
    return lambda page_size: Service(Beside.REPLAY, offsets_for(recording, page_size), skipped=recording.skipped)


def _read_recording(memory: Path, memory_bytes: int, replay: Path) -> Recording:
    recording = read_access_log(replay, memory_bytes)
    why = refusal(recording, memory=_identity(memory) if recording.memory else None)
    if why:
        raise VmdError(f"replay {replay}: {why}")
    if recording.skipped:
        _warn(f"replay {replay}: {recording.skipped} bad lines skipped")
    return recording


def _image_bytes(memory: Path) -> int:
    with closing(Image(memory)) as image:
        return image.size


def _identity(memory: Path) -> str:
    with closing(Image(memory)) as image:
        return image.identity()


def _write_record(record: Path, identity: str, server: PageServer, ended: Ended) -> None:
    """Write what was touched; an old file stays when there was no VM, or it could not be served."""
    page_size = server.stats()["page_size"]
    if page_size is None or ended.reason is EndReason.FAILED:
        return
    word = "exited" if ended.reason is EndReason.GONE else "stopped"
    offsets = array("Q", server.touched())
    write_access_log(record, Recording(page_size, offsets, memory=identity, ended=word))


def _leave(server: PageServer, ended: Ended) -> NoReturn:
    stats = server.stats()
    if ended.reason is EndReason.STOPPED and stats["vmm_pid"] is not None:
        _warn(f"vmm {stats['vmm_pid']} left frozen; there is no journal to adopt it by")
    line = exit_line(ended, stats["poisoned"])
    if line is not None:
        _say(f"vmd: error: {line}")
    sys.stdout.flush()
    os._exit(1 if line is not None else 0)  # at once: tearing the interpreter down takes 10 ms and more
