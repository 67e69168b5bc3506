"""Stage 6: one sandbox: made from a template, asked, looked at, killed.

Without a daemon the truth about what runs is /proc, and ``sandboxes/<id>/sandbox.json`` says where to
look: pids are only believed together with their start times and the boot they belong to.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import template as templates
from .backend import Asked, Request
from .errors import NotFound, UsageError, VmdError
from .pager import look
from .pager.control import Control, PagerGone
from .pager.start import LOG, request, running, unserved
from .pages.detached import DetachedPages, read_stats
from .pages.server import PageServer
from .restore import Restored, restore
from .settings import Settings
from .states import State, guard, observed
from .store import RECORD, Registry, read_json, write_json
from .tasks import finish
from .template import Template
from .vmm import process
from .vmm.console import Console

SCHEMA = 1

_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_ID_CHARS = 10
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

# A page server sees its VMM's end within 100 ms; a process of its own that does not is killed.
_PAGES_END_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Process:
    """A process that is recognized: its pid and its start time (clock ticks since boot).

    ``shared``: it does other work too, and is not ours to kill.
    """

    pid: int
    start_time: int
    shared: bool = False

    def alive(self) -> bool:
        """Whether this very process still runs."""
        pidfd = process.find(self.pid, self.start_time)
        if pidfd is None:
            return False
        os.close(pidfd)
        return True


@dataclass(frozen=True, slots=True)
class Record:
    """What ``sandbox.json`` holds; times in ms.

    Who serves its pages: the pager, by ``journal``; or the process ``pages``; or, under the File backend, nobody.
    ``replay_skipped`` and ``replay_refused``: see `vmd.pages.contract.Service`.
    """

    id: str
    template: str
    snapshot_id: str
    backend: str
    backend_reason: str
    created_at: float
    timings_ms: dict[str, float]
    directory: str
    boot_id: str
    vmm: Process
    pages: Process | None
    journal: str | None = None
    replay_skipped: int = 0
    replay_refused: str | None = None

    def save(self) -> dict[str, Any]:
        """As it is written."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read it back. Raises `NotFound`, and `VmdError` for what this vmd did not write."""
        what = f"sandbox {path.parent.name}"
        try:
            saved = read_json(path, what)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"{what}: there is none of that id", hint="vmd ls") from None
        if saved.pop("schema", None) != SCHEMA:
            raise VmdError(f"{what}: {path} is of another vmd", hint=f"remove {path.parent}")
        try:
            vmm, pages = Process(**saved.pop("vmm")), saved.pop("pages")
            return cls(**saved, vmm=vmm, pages=Process(**pages) if pages else None)
        except (KeyError, TypeError) as broken:
            raise VmdError(f"{what}: {path}: {broken}", hint=f"remove {path.parent}") from broken


class Sandbox:
    """One sandbox, made here (`create`) or found (`find`, `list_all`).

    One that was made here and not detached ends with this process; it owns its VMM and page server.
    """

    def __init__(self, settings: Settings, record: Record, restored: Restored | None = None) -> None:
        self.record = record
        self._settings = settings
        self._restored = restored

    @property
    def id(self) -> str:
        """``sb-`` and ten of a-z2-7."""
        return self.record.id

    def state(self) -> State:
        """Running, frozen (the page server is gone) or dead (the VMM is), as /proc says now."""
        record = self.record
        if record.boot_id != _boot_id():
            return State.DEAD
        return observed(vmm_alive=record.vmm.alive(), pages_alive=self._pages_alive())

    def is_left(self) -> bool:
        """Whether the pager should serve it, and nobody does."""
        return self.record.journal is not None and self.state() is State.FROZEN

    async def ask(self, line: str, seconds: float) -> str:
        """One command line to the guest's console; its answer.

        Raises `Conflict` unless it is running, `VmmError`, `PagesFailed`, `TimedOut`, `UsageError`.
        """
        guard(self.id, self.state(), "exec")
        if self._restored is not None:
            return await self._restored.ask(line, seconds)
        return await Console(Path(self.record.directory), self.record.vmm.alive).ask(line, seconds)

    def stats(self) -> dict[str, Any] | None:
        """The page server's ``--stats`` object, at most 200 ms old; None where there is none."""
        if self._restored is not None:
            return self._restored.pages.stats() if self._restored.pages else None
        if self.record.journal is not None:
            return self._journal_stats(Path(self.record.journal))
        return (read_stats(Path(self.record.directory)) or None) if self.record.pages else None

    def describe(self) -> dict[str, Any]:
        """The object of ``vmd ls`` and ``vmd create``: what interfaces.md names, the state, and the record."""
        record = self.record
        pages_pid = record.pages.pid if record.pages else None
        if record.journal is not None:
            with contextlib.suppress(VmdError):
                pages_pid = look.read(Path(record.journal)).server_pid
        return {
            "id": record.id,
            "state": str(self.state()),
            "template": record.template,
            "snapshot_id": record.snapshot_id,
            "backend": record.backend,
            "backend_reason": record.backend_reason,
            "vmm_pid": record.vmm.pid,
            "pages_pid": pages_pid,
            "created_at": record.created_at,
            "timings_ms": record.timings_ms,
        }

    async def kill(self) -> None:
        """End it: the VMM, then the page server, then its files. A dead one is cleaned up. Idempotent.

        Not cut short by a cancellation. Raises `TimedOut`, `VmdError`.
        """
        await finish(self._end())

    async def _end(self) -> None:
        if self._restored is not None:
            await self._restored.close()
        elif self.record.boot_id == _boot_id():
            await _kill(self.record.vmm)
            if self.record.pages is not None and not self.record.pages.shared:
                await _kill(self.record.pages, grace_seconds=_PAGES_END_SECONDS)
        _reap()
        for directory in (Path(self.record.directory), _home(self._settings, self.id)):
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(shutil.rmtree, directory)

    def _journal_stats(self, journal: Path) -> dict[str, Any] | None:
        with contextlib.suppress(VmdError, PagerGone):  # then it is as old as the last request
            if (control := running(self._settings)) is not None:
                with control:
                    control.publish(self.id)
        with contextlib.suppress(VmdError):
            return look.read(journal).report(self.record.replay_skipped, self.record.replay_refused)
        return None

    def _pages_alive(self) -> bool:
        if self._restored is not None:
            return self._restored.pages_alive()
        if self.record.journal is not None:
            return look.is_served(Path(self.record.journal))
        return self.record.pages is None or self.record.pages.alive()


async def create(
    settings: Settings,
    template: str,
    *,
    backend: Asked = "auto",
    detached: bool = False,
    warn: Callable[[str], None] = lambda line: None,
) -> Sandbox:
    """Restore a new sandbox from ``template`` and record it.

    ``detached``: it outlives this process. Raises `NotFound`, `BackendUnavailable`, `SnapshotError`,
    `RestoreFailed`; then, as after a cancellation, nothing is left.
    """
    _reap()
    found = templates.load(settings, template)
    sandbox_id = _new_id()
    home = _homes(settings).make() / sandbox_id
    request = Request(
        sandbox_id, found.name, found.snapshot, backend, access_log=found.access_log, detached=detached, home=home
    )
    try:
        restored = await restore(request, settings, warn=warn)
    except BaseException:
        shutil.rmtree(home, ignore_errors=True)
        raise
    try:
        record = _record(found, restored)
        write_json(home / RECORD, record.save())
        if detached:
            restored.forget()
            _children.update(child for child in (record.vmm, record.pages) if child is not None)
    except BaseException:
        await finish(restored.close())
        shutil.rmtree(home, ignore_errors=True)
        raise
    return Sandbox(settings, record, None if detached else restored)


def list_all(settings: Settings, warn: Callable[[str], None] = lambda line: None) -> list[Sandbox]:
    """All recorded sandboxes, oldest first; a record that cannot be read is warned of and left out."""
    found = []
    for home in _homes(settings).entries():
        try:
            found.append(Sandbox(settings, Record.load(home / RECORD)))
        except NotFound:
            continue  # being made, or being removed
        except VmdError as failure:
            warn(str(failure))
    return sorted(found, key=lambda sandbox: (sandbox.record.created_at, sandbox.id))


def recover(settings: Settings, warn: Callable[[str], None] = lambda line: None) -> None:
    """Have VMs served again whose pager and standby died together; kill those that cannot be.

    The new pager finds them by their journals, and kills what it finds but cannot adopt. Here end those
    whose journal does not even say which VMM it is of. Each that is lost is warned of.
    """
    left = [sandbox for sandbox in list_all(settings) if sandbox.is_left()] if unserved(settings) else []
    if not left:
        return

    def unserved_still(control: Control) -> list[Sandbox]:
        control.status()  # answered when all have been adopted
        found = [sandbox for sandbox in left if sandbox.state() is not State.RUNNING]
        control.status()  # this pager has not died meanwhile, or it is the next one's turn
        return found

    try:
        lost = request(settings, unserved_still)
    except VmdError as failure:  # no reason not to do what the command is for
        warn(f"sandboxes that nobody serves: {failure}")
        return
    for sandbox in lost:
        warn(f"sandbox {sandbox.id}: nobody can serve its pages: its VMM is killed; see {settings.run_dir / LOG}")
        if (pidfd := process.find(sandbox.record.vmm.pid, sandbox.record.vmm.start_time)) is not None:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def find(settings: Settings, prefix: str) -> Sandbox:
    """The sandbox of this id, or the only one whose id begins so. Raises `NotFound`, `UsageError`."""
    homes = _homes(settings)
    names = [home.name for home in homes.entries()]
    matches = [prefix] if prefix in names else [name for name in names if prefix and name.startswith(prefix)]
    if not matches:
        raise NotFound(f"sandbox {prefix}: there is none of that id", hint="vmd ls")
    if len(matches) > 1:
        raise UsageError(f"sandbox {prefix}: {len(matches)} ids begin so: {', '.join(sorted(matches)[:5])}")
    return Sandbox(settings, Record.load(homes.path / matches[0] / RECORD))


def _record(template: Template, restored: Restored) -> Record:
    served = restored.pages.replay() if isinstance(restored.pages, PageServer) else None
    return Record(
        id=restored.request.sandbox_id,
        template=template.name,
        snapshot_id=template.snapshot.snapshot_id,
        backend=restored.backend,
        backend_reason=restored.backend_reason,
        created_at=time.time(),
        timings_ms=restored.timings_ms,
        directory=str(restored.directory),
        boot_id=_boot_id(),
        vmm=Process(restored.vmm.pid, restored.vmm.start_time),
        pages=_server_of(restored),
        journal=_journal_of(restored),
        replay_skipped=served.skipped if served else 0,
        replay_refused=served.refused if served else None,
    )


def _journal_of(restored: Restored) -> str | None:
    """The journal by which the pager serves it."""
    in_pager = restored.request.detached and isinstance(restored.pages, PageServer)
    return str(restored.directory / look.JOURNAL) if in_pager else None


def _server_of(restored: Restored) -> Process | None:
    """The process that serves its pages, where it is no pager: one of its own, or this one."""
    if restored.pages is None or _journal_of(restored) is not None:
        return None
    pid = restored.pages.pid if isinstance(restored.pages, DetachedPages) else os.getpid()
    return Process(pid, process.start_time(pid), shared=pid == os.getpid())


# Detached, but children of this process all the same: when they end, nobody else can take them from the process table.
_children: set[Process] = set()


def _reap() -> None:
    """Take the exit status of detached children that have ended; a process may make many and live for long."""
    for child in [child for child in _children if not child.alive()]:
        _children.discard(child)
        # Its start time, because the pid may be somebody else's by now; a zombie still has one.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if process.start_time(child.pid) == child.start_time:
                os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG)


async def _kill(victim: Process, *, grace_seconds: float = 0.0) -> None:
    """Kill it after giving it the grace to end by itself, and wait for the end."""
    pidfd = process.find(victim.pid, victim.start_time)
    if pidfd is None:
        return
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await process.exited(pidfd)
        await process.kill(pidfd)
    finally:
        os.close(pidfd)


def _homes(settings: Settings) -> Registry:
    return Registry(settings.state_dir, "sandboxes")


def _home(settings: Settings, sandbox_id: str) -> Path:
    return _homes(settings).path / sandbox_id


def _new_id() -> str:
    return "sb-" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_CHARS))


def _boot_id() -> str:
    return _BOOT_ID.read_text(encoding="ascii").strip()
