"""`vmd pages`: a page server for one VM, usable with any Firecracker."""

from __future__ import annotations

import os
import stat
import sys
from array import array
from collections.abc import Callable
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import NoReturn

import click

from ..errors import UsageError, VmdError
from ..pages.contract import Beside, Ended, EndReason, Service
from ..pages.cores import core_name
from ..pages.journal import require_native
from ..pages.life import Server
from ..pages.server import PageServer, serve_pages
from ..pages.serving import Serving, Signals, exit_line, say, warn
from ..pages.source import Image
from ..recording import Recording, offsets_for, read_access_log, refusal, write_access_log
from ..settings import Settings


@click.group()
def pages() -> None:
    """Serve the memory of a VM page by page, with any Firecracker."""


# chown(2) takes -1, which is the highest number, for "leave it as it is".
_ID_MAX = (1 << 32) - 2
_ID_DIGITS_MAX = 10
_SHOWN_CHARS = 40
# poll(2) takes milliseconds in 31 bits: 24 days.
_ACCEPT_SECONDS_MAX = 2_000_000
# pid_t has 31 bits.
_PID_MAX = (1 << 31) - 1


def _parse_owner(_: click.Context, __: click.Parameter, word: str | None) -> tuple[int, int] | None:
    if word is None:
        return None
    uid, _colon, gid = word.partition(":")
    if not (_is_id(uid) and _is_id(gid)):
        raise click.BadParameter(f"expected UID:GID as numbers up to {_ID_MAX}, got {word[:_SHOWN_CHARS]!r}")
    return int(uid), int(gid)


def _is_id(word: str) -> bool:
    # The length first: int() refuses words of thousands of digits in its own words.
    return word.isascii() and word.isdecimal() and len(word) <= _ID_DIGITS_MAX and int(word) <= _ID_MAX


def _parse_seconds(_: click.Context, __: click.Parameter, seconds: float | None) -> float | None:
    if seconds is not None and not 0 < seconds <= _ACCEPT_SECONDS_MAX:
        raise click.BadParameter(f"expected seconds above 0, up to {_ACCEPT_SECONDS_MAX}, got {seconds:g}")
    return seconds


_stats_option = click.option(
    "--stats",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep statistics in this JSON file: every 200 ms, at the end, and on SIGUSR1.",
)


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
@click.option(
    "--journal",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Make this file, best on a tmpfs: should this process die, `vmd pages adopt` goes on from it.",
)
@_stats_option
@click.option(
    "--owner",
    callback=_parse_owner,
    metavar="UID:GID",
    help="Give the socket to this user and group, for a jailed VMM.",
)
@click.option(
    "--accept-timeout",
    type=float,
    callback=_parse_seconds,
    metavar="S",
    help="Seconds to wait for a good handshake. Default: no limit.",
)
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
    if sum((record is not None, replay is not None, no_prefetch)) > 1:
        raise UsageError("--record, --replay and --no-prefetch exclude each other")
    paths = {"--socket": socket_path, "--memory": memory, "--replay": replay, "--record": record}
    _check_paths({**paths, "--journal": journal, "--stats": stats})
    settings = Settings.read()
    if journal is not None:
        require_native(core_name(settings.core), "--journal")
    signals = _begin()
    identity = _identity(memory) if record is not None else ""
    service = _service(memory, replay, record, no_prefetch, settings)
    server = serve_pages(
        socket_path, memory, service,
        owner=owner, core=settings.core, accept_seconds=accept_timeout, journal=journal, warn=warn,
    )  # fmt: skip
    try:
        ended = _serve_ready(server, signals, stats)
    except BaseException:  # the socket is not to stay
        server.close()
        raise
    failure = None if record is None else _write_record(record, identity, server, ended)
    _leave(server, ended, journal, failure)


@pages.command()
@click.option(
    "--pid", required=True, type=click.IntRange(1, _PID_MAX), metavar="VMM_PID", help="The VMM, which is frozen."
)
@click.option(
    "--journal",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What its page server has left: the file of `pages serve --journal`.",
)
@_stats_option
def adopt(pid: int, journal: Path, stats: Path | None) -> NoReturn:
    """Take over a VM whose page server is gone; end with it.

    Prints `ready` when it serves, and goes on with replay or prefetch where they were. What is refused
    is left as it was: a VMM that does not run or is not the journal's, one that holds no userfaultfd, a
    journal that is missing, damaged, of another version or locked by a living page server, another image.
    Needs the right to ptrace the VMM, as root has it.

    \b
    Exit codes:
      0  the VMM has exited, or SIGTERM or SIGINT ended the serving
      1  anything else, with one line on stderr that names what and why
      2  usage
    """
    _check_paths({"--journal": journal, "--stats": stats})
    require_native(core_name(Settings.read().core), "pages adopt")
    signals = _begin()
    from ..pages.adopted import AdoptedServer

    server = AdoptedServer(journal, pid, warn=warn)
    server.start()
    ended = _serve_ready(server, signals, stats)
    _leave(server, ended, journal, None)


def _begin() -> Signals:
    """From here on a signal is heard, not died of; descriptors 0 to 2 are standard streams, if only /dev/null."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    signals = Signals()
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115  (an error must not turn to stdout)
    os.umask(os.umask(0o077) & 0o077)  # the socket's mode is 0600 under any umask
    return signals


def _check_paths(given: dict[str, Path | None]) -> None:
    """A recording must not be lost in the end, nor anything else overwritten, for a typo. `UsageError`, `VmdError`."""
    for option in ("--record", "--stats"):
        output = given.get(option)
        if output is not None and not _is_replaceable(output):
            raise UsageError(f"{option} {output}: this is there and not a regular file, and would be replaced by one")
    paths = [(option, path) for option, path in given.items() if path is not None]
    for (one, path), (other, same) in combinations(paths, 2):
        if _is_same(path, same):
            raise UsageError(f"{one} and {other} are the same file: {same}")
    record = given.get("--record")
    if record is not None and not os.access(record.absolute().parent, os.W_OK):
        raise VmdError(f"record {record}: its directory does not exist or cannot be written")


def _is_replaceable(path: Path) -> bool:
    """Whether nothing is there, or a file; neither a device nor a link, which a rename over it would destroy."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:  # not there, or not to be seen: who writes it says so
        return True


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return _place(one) == _place(other)


def _place(path: Path) -> tuple[str, str]:
    return os.path.realpath(path.parent), path.name


def _serve_ready(server: Server, signals: Signals, stats: Path | None) -> Ended:
    serving = Serving(server, signals, stats_path=stats)
    serving.write_stats()
    try:
        os.write(1, b"ready\n")
    except OSError as failure:
        raise VmdError(f"ready: write to stdout: {failure.strerror}") from failure
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
        warn(f"{refused}; serving without replay")
        return lambda _: Service(Beside.NOTHING, refused=refused)
    return lambda page_size: Service(Beside.REPLAY, offsets_for(recording, page_size), skipped=recording.skipped)


def _read_recording(memory: Path, memory_bytes: int, replay: Path) -> Recording:
    recording = read_access_log(replay, memory_bytes)
    why = refusal(recording, memory=_identity(memory) if recording.memory else None)
    if why:
        raise VmdError(f"replay {replay}: {why}")
    if recording.skipped:
        warn(f"replay {replay}: {recording.skipped} bad lines skipped")
    return recording


def _image_bytes(memory: Path) -> int:
    with closing(Image(memory)) as image:
        return image.size


def _identity(memory: Path) -> str:
    with closing(Image(memory)) as image:
        return image.identity()


def _write_record(record: Path, identity: str, server: PageServer, ended: Ended) -> str | None:
    """Write what was touched; an old file stays when there was no VM, or it could not be served.

    Returns what went wrong: there is still something to say of the VM.
    """
    page_size = server.stats()["page_size"]
    if page_size is None or ended.reason is EndReason.FAILED:
        return None
    word = "exited" if ended.reason is EndReason.GONE else "stopped"
    offsets = array("Q", server.touched())
    try:
        write_access_log(record, Recording(page_size, offsets, memory=identity, ended=word))
    except VmdError as failure:
        return f"record: {failure}"
    return None


def _leave(server: Server, ended: Ended, journal: Path | None, failure: str | None) -> NoReturn:
    stats = server.stats()
    if ended.reason is EndReason.STOPPED and stats["vmm_pid"] is not None:
        pid = stats["vmm_pid"]
        way = "there is no journal to adopt it by"
        if journal is not None:
            way = f"vmd pages adopt --pid {pid} --journal {journal} goes on"
        warn(f"vmm {pid} left frozen; {way}")
    why = "; ".join(line for line in (exit_line(ended, stats["poisoned"]), failure) if line)
    if why:
        say(f"vmd: error: {why}")
    os._exit(1 if why else 0)  # at once: tearing the interpreter down takes 10 ms and more
