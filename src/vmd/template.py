"""Stage 1: what sandboxes are created from: a snapshot, its recording, one manifest.

``templates/<name>/`` holds ``vmstate``, ``memory``, ``access.log`` and ``template.json``. A build works in
``templates/.build-<name>-<random>/``, which it owns by a lock (`store`), and renames it at the end, the
manifest written last: what has a manifest under its name is complete. A removal goes the way back. The
VMs of a build die with the builder; what a dead builder leaves is swept by the next command, and nothing
else: the directory may hold what somebody else keeps there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import time
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import guest, limits
from . import snapshot as snapshots
from .backend import Request
from .errors import Conflict, NotFound, SnapshotError, UsageError, VmdError
from .pages.server import PageServer
from .pages.source import Image
from .recording import Recording, read_access_log, settled, write_access_log
from .restore import Restored, restore
from .settings import Settings
from .snapshot import PAGE_SIZES, Snapshot
from .store import Owned, Registry, read_json, runs, sweep_runs, sync_directory, write_json
from .tasks import finish
from .vmm.process import find_firecracker
from .vmm.vmm import Vmm

SCHEMA = 1
MANIFEST = "template.json"
ACCESS_LOG = "access.log"
STAGING = ".build-"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_EPHEMERAL = "build-"
# Names that only a build or a removal gives; whatever else lies among the templates is not ours to sweep.
_OURS = rf"{re.escape(STAGING)}(?:.+-)?[0-9a-f]{{8}}"
_BOOT_ARGS = "seed=1 fill=75"
_READY_LINE = "ready micro 1 "
_HUGE_PAGES_FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a template is built from.

    ``mem_mib``: guest memory in MiB. ``page_size``: bytes, 4096 or 2 MiB. ``start``: the command line whose
    page touches are recorded.
    """

    mem_mib: int
    page_size: int = 4096
    start: str = "sweep"
    guest: str = "micro"

    def check(self) -> None:
        """Raises `UsageError`, and `Conflict` when the host has too few free huge pages."""
        if self.guest != "micro":
            raise UsageError(f"guest {self.guest!r}: only the built-in guest, micro, is known")
        if self.page_size not in PAGE_SIZES:
            raise UsageError(f"page size {self.page_size}: expected {' or '.join(map(str, PAGE_SIZES))}")
        if self.mem_mib < 2 or self.mem_mib % 2:
            raise UsageError(f"memory {self.mem_mib} MiB: expected an even number of at least 2")
        if self.page_size > 4096:
            _require_huge_pages(self.mem_mib * (1 << 20) // self.page_size)


@dataclass(frozen=True, slots=True)
class Template:
    """A complete template; ``recording_ended`` is settled, timeout, silent, failed or off."""

    name: str
    directory: Path
    snapshot: Snapshot
    shape: Shape
    recorded_pages: int
    recording_ended: str
    created_at: float

    @property
    def access_log(self) -> Path:
        """The recording; absent when nothing was recorded."""
        return self.directory / ACCESS_LOG

    def save(self) -> dict[str, Any]:
        """The manifest, as ``template.json`` has it and ``vmd template inspect --json`` prints it."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "created_at": self.created_at,
            "guest": self.shape.guest,
            "mem_mib": self.shape.mem_mib,
            "page_size": self.shape.page_size,
            "start": self.shape.start,
            "ready": {"ask": "ping", "answer": "pong"},
            "cpu_template": None,
            "recorded_pages": self.recorded_pages,
            "recording_ended": self.recording_ended,
            "snapshot": self.snapshot.save(),
        }


def load(settings: Settings, name: str) -> Template:
    """The template ``name``. Raises `NotFound`, `UsageError` (no such name can be), `SnapshotError`."""
    check_name(name)
    registry = _registry(settings)
    template = _load(registry.path / name) if registry.there() else None
    if template is None:
        raise NotFound(f"template {name}: there is none of that name", hint="vmd template ls")
    return template


def list_all(settings: Settings, warn: Callable[[str], None] = lambda line: None) -> list[Template]:
    """All complete templates by name; one whose manifest cannot be read is warned of and left out."""
    found = []
    for directory in _registry(settings).entries():
        if not directory.name.startswith("."):
            try:
                template = _load(directory)
            except VmdError as failure:
                warn(str(failure))
                continue
            if template is not None:
                found.append(template)
    return found


def remove(settings: Settings, name: str) -> None:
    """Remove the template: its name in one step, its files then. Sandboxes that run from it keep what they have open.

    Raises `NotFound`, `Conflict` (it is a symbolic link), `TimedOut`.
    """
    check_name(name)
    registry = _registry(settings)
    directory = registry.path / name
    with registry.locked():
        if not (directory / MANIFEST).exists():
            raise NotFound(f"template {name}: there is none of that name", hint="vmd template ls")
        if directory.is_symlink():
            raise Conflict(f"template {name}: {directory} is a symbolic link", hint=f"rm {directory}")
        owned = registry.take(directory)
        try:
            owned.rename(registry.path / f"{STAGING}{secrets.token_hex(4)}")
        except OSError:
            owned.disown()
            raise
    owned.discard()


def sweep(settings: Settings) -> list[Path]:
    """Remove what dead builders and removers left among the templates; says what it was."""
    registry = _registry(settings)
    if not registry.dead():
        return []
    with registry.locked():  # nobody is between making a directory and owning it now
        dead = registry.take_over_dead()
    for owned in dead:
        owned.discard()
    return [owned.path for owned in dead]


def check_name(name: str) -> None:
    """Raises `UsageError` when ``name`` cannot be a template's."""
    if len(name) > limits.NAME_CHARS_MAX or not _NAME.fullmatch(name) or name.startswith(_EPHEMERAL):
        raise UsageError(
            f"template name {name!r}: expected 1 to {limits.NAME_CHARS_MAX} of a-z 0-9 . _ -, the first a letter or "
            f"digit, and no {_EPHEMERAL!r} in front"
        )


async def build(
    settings: Settings,
    name: str,
    shape: Shape,
    *,
    warn: Callable[[str], None] = lambda line: None,
    progress: Callable[[str], None] = lambda line: None,
) -> Template:
    """Boot, freeze, record, and put the template in its place.

    A recording that fails is a warning. Raises `UsageError`, `Conflict` (the name is taken, or being
    built), `VmmError`, `TimedOut`, `SnapshotError`; then, as after a cancellation, nothing is left.
    """
    check_name(name)
    shape.check()
    await asyncio.to_thread(lambda: (sweep(settings), sweep_runs(settings)))
    staging = await _stage(settings, name)
    try:
        progress(f"booting {shape.guest} with {shape.mem_mib} MiB")
        async with _booted(settings, name, shape) as vmm:
            progress("freezing")
            firecracker = Path(find_firecracker(settings))
            snapshot = await snapshots.freeze(vmm, staging.path, firecracker=firecracker, page_size=shape.page_size)
        template = Template(name, staging.path, snapshot, shape, 0, "off", time.time())
        progress(f"recording {shape.start!r}")
        template = await record(settings, template, warn=warn)
        return await _publish(settings, staging, template)
    finally:
        staging.discard()


async def record(
    settings: Settings, template: Template, *, warn: Callable[[str], None] = lambda line: None
) -> Template:
    """Restore the template's snapshot under a recording page server, run its start command, write the log.

    An existing log of this snapshot is kept as it is; with a breaker open nothing is recorded. A
    recording that fails is a warning. Returns the template with what came of it.
    """
    kept = _existing(template)
    if kept is not None:
        return replace(template, recorded_pages=len(kept.offsets), recording_ended=kept.ended or "settled")
    if not (settings.uffd_enabled and settings.prefetch_enabled):
        return replace(template, recording_ended="off")
    try:
        recording = await _watch_start(settings, template, warn)
        if recording.offsets:
            await asyncio.to_thread(write_access_log, template.access_log, recording)
    except (VmdError, OSError) as failure:
        warn(f"recording of template {template.name}: {failure}; sandboxes start without replay")
        return replace(template, recording_ended="failed")
    return replace(template, recorded_pages=len(recording.offsets), recording_ended=recording.ended or "silent")


def _existing(template: Template) -> Recording | None:
    try:
        kept = read_access_log(template.access_log, template.snapshot.memory_bytes)
    except VmdError:
        return None
    return kept if kept.snapshot == template.snapshot.snapshot_id else None


async def _watch_start(settings: Settings, template: Template, warn: Callable[[str], None]) -> Recording:
    """Restore, start, watch the faults until they settle. Nothing of the VM is left afterwards."""
    request = Request(f"{_EPHEMERAL}record-{template.name}", template.name, template.snapshot, "uffd", record=True)
    restored = await restore(request, settings, warn=warn)
    try:
        pages = restored.pages
        assert isinstance(pages, PageServer)
        started = asyncio.ensure_future(_start(restored, template.shape.start, settings.record_seconds_max))
        try:
            counts, verdict = await _settle(pages, started, settings.record_seconds_max)
        finally:
            started.cancel()
            await asyncio.gather(started, return_exceptions=True)
        return Recording(
            page_size=template.snapshot.page_size,
            offsets=array("Q", [] if verdict == "silent" else pages.touched()),
            snapshot=template.snapshot.snapshot_id,
            memory=await asyncio.to_thread(_identity, template.snapshot.memory),
            ended=verdict,
            faults_per_tick=tuple(now - before for before, now in pairwise((0, *counts))),
        )
    finally:
        await finish(restored.close())


def _identity(memory: Path) -> str:
    image = Image(memory)
    try:
        return image.identity()
    finally:
        image.close()


async def _start(restored: Restored, command: str, seconds: float) -> None:
    answer = await restored.ask(command, seconds + limits.GUEST_READY_SECONDS)
    if answer.startswith("error"):
        raise VmdError(f"the guest answered {answer!r} to {command!r}")


async def _settle(pages: PageServer, started: asyncio.Future[None], seconds_max: float) -> tuple[list[int], str]:
    """Sample the live counters at each tick until the detector has its verdict. Raises what ``started`` does."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    counts: list[int] = []
    while True:
        await asyncio.sleep(began + (len(counts) + 1) * limits.SETTLE_TICK_SECONDS - loop.time())
        if started.done():
            started.result()
        counts.append(pages.counters().faults)
        verdict = settled(counts, seconds_max)
        if verdict is not None:
            return counts, verdict


@contextlib.asynccontextmanager
async def _booted(settings: Settings, name: str, shape: Shape) -> AsyncIterator[Vmm]:
    """A VM of this shape, booted and ready, that dies with this process and at the end of the block."""
    registry = runs(settings)
    async with registry.locked_async():
        owned = registry.own(f"{_EPHEMERAL}boot-{name}-{secrets.token_hex(4)}")
    try:
        vmm = await Vmm.spawn(find_firecracker(settings), owned.path, f"{_EPHEMERAL}boot", dies_with_parent=True)
        try:
            huge = shape.page_size > 4096
            await vmm.boot(
                kernel=guest.kernel(),
                boot_args=_BOOT_ARGS,
                mem_mib=shape.mem_mib,
                huge_pages=huge,
                balloon=not huge,
            )
            await vmm.console.wait_line(_READY_LINE, limits.GUEST_BOOT_SECONDS)
            yield vmm
        finally:
            await finish(vmm.kill())
    finally:
        owned.discard()


def _registry(settings: Settings) -> Registry:
    return Registry(settings.state_dir, "templates", ours=_OURS)


async def _stage(settings: Settings, name: str) -> Owned:
    registry = _registry(settings)
    async with registry.locked_async():
        _require_free(registry.path / name)
        if any(entry.name.rpartition("-")[0] == STAGING + name for entry in registry.entries()):
            raise Conflict(f"template {name} is being built")
        return registry.own(f"{STAGING}{name}-{secrets.token_hex(4)}")


async def _publish(settings: Settings, staging: Owned, template: Template) -> Template:
    """Write the manifest and put the staging directory in its place, owner to the last moment."""
    write_json(staging.path / MANIFEST, template.save())
    registry = _registry(settings)
    directory = registry.path / template.name
    async with registry.locked_async():
        _require_free(directory)
        staging.rename(directory)
        staging.disown()
    sync_directory(registry.path)
    return replace(template, directory=directory, snapshot=replace(template.snapshot, directory=directory))


def _require_free(directory: Path) -> None:
    if (directory / MANIFEST).exists():
        raise Conflict(f"template {directory.name} exists", hint=f"vmd template rm {directory.name}")
    if os.path.lexists(directory):
        raise Conflict(f"{directory} is in the way, and is no template", hint="move it, or set VMD_STATE_DIR")


def _load(directory: Path) -> Template | None:
    what = f"template {directory.name}"
    try:
        saved = read_json(directory / MANIFEST, what)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except VmdError as broken:
        raise SnapshotError(str(broken), hint="build it anew") from broken
    if saved.get("schema") != SCHEMA:
        raise SnapshotError(f"{what}: schema {saved.get('schema')!r}, this vmd reads {SCHEMA}", hint="build it anew")
    try:
        return Template(
            name=directory.name,
            directory=directory,
            snapshot=snapshots.load(directory, saved["snapshot"]),
            shape=Shape(saved["mem_mib"], saved["page_size"], saved["start"], saved["guest"]),
            recorded_pages=saved["recorded_pages"],
            recording_ended=saved["recording_ended"],
            created_at=saved["created_at"],
        )
    except KeyError as missing:
        raise SnapshotError(f"{what}: the manifest lacks {missing}", hint="build it anew") from None


def _require_huge_pages(pages: int) -> None:
    try:
        free = int(_HUGE_PAGES_FREE.read_text())
    except (OSError, ValueError):
        free = 0
    if free < pages:
        raise Conflict(
            f"2 MiB pages: {pages} are needed, {free} are free on this host",
            hint=f"echo {pages} > /proc/sys/vm/nr_hugepages",
        )
