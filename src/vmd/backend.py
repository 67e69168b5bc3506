"""Stage 4, first half: what is asked for, which backend serves it, what its page server does beside demand.

The two breakers of the environment act here and nowhere else: VMD_UFFD_ENABLED in `choose_backend`,
VMD_UFFD_PREFETCH_ENABLED in `plan_service`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from .errors import BackendUnavailable, VmdError
from .pages.contract import Beside, Service
from .recording import Recording, offsets_for, read_access_log, refusal
from .settings import Settings
from .snapshot import Snapshot

IMAGE_LINK = "memory"
"""A sandbox's own link to its image, in its directory."""

Backend = Literal["uffd", "file"]
Asked = Literal["auto", "uffd", "file"]


@dataclass(frozen=True, slots=True)
class Request:
    """What to restore.

    ``name``: of the template, for texts. ``access_log``: the recording that replay follows; it need
    not exist. ``record``: log the demand faults instead. ``detached``: the sandbox outlives this
    process, served by the pager; else both end with it. ``home``: the sandbox's directory, made here.
    """

    sandbox_id: str
    name: str
    snapshot: Snapshot
    backend: Asked = "auto"
    access_log: Path | None = None
    record: bool = False
    detached: bool = False
    home: Path | None = None

    def link_image(self) -> Path:
        """The memory file to serve from: in ``home`` a link to it is made, which outlives the template.

        Raises OSError.
        """
        if self.home is None:
            return self.snapshot.memory
        self.home.mkdir(mode=0o700, parents=True)
        link = self.home / IMAGE_LINK
        try:
            link.hardlink_to(self.snapshot.memory)
        except OSError as failure:
            if failure.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):  # a file system may not know links
                raise
            return self.snapshot.memory
        return link


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend, and the sentence that says why this one."""

    backend: Backend
    reason: str


def choose_backend(asked: Asked, settings: Settings, page_size: int) -> Choice:
    """Which memory backend serves a snapshot of ``page_size`` (bytes). Raises `BackendUnavailable`.

    The one place where VMD_UFFD_ENABLED acts.
    """
    huge = page_size > 4096
    if asked == "file" and huge:
        raise BackendUnavailable(
            "backend file: Firecracker loads 2 MiB pages through userfaultfd only", hint="use --backend uffd"
        )
    if asked == "file":
        return Choice("file", "asked for")
    if settings.uffd_enabled:
        return Choice("uffd", "asked for" if asked == "uffd" else "userfaultfd is in service")
    hint = "set VMD_UFFD_ENABLED=true to close the breaker"
    if huge:
        raise BackendUnavailable("2 MiB pages need userfaultfd, and VMD_UFFD_ENABLED=false", hint=hint)
    if asked == "uffd":
        raise BackendUnavailable("backend uffd: VMD_UFFD_ENABLED=false", hint=f"{hint}, or use --backend auto")
    return Choice("file", "breaker open: VMD_UFFD_ENABLED=false")


def plan_service(request: Request, settings: Settings, warn: Callable[[str], None]) -> Service:
    """What the page server does beside demand faults for this request.

    Recorded order where there is a recording of this snapshot; the sequential fallback where there
    is none; demand only where one is refused (one warning), and under VMD_UFFD_PREFETCH_ENABLED=false.
    """
    if request.record:
        return Service(Beside.RECORD)
    if not settings.prefetch_enabled:
        return Service(Beside.NOTHING)
    log = request.access_log
    if log is None or not log.exists():
        return Service(Beside.SEQUENTIAL, prefetch_bytes_max=settings.prefetch_bytes_max)
    try:
        recording = _read_recording(log, request.snapshot.memory_bytes, *_identity(log))
        refused = refusal(recording, snapshot=request.snapshot.snapshot_id, memory=None)
    except (VmdError, OSError) as failure:
        refused = words(failure)
    if refused is not None:
        warn(f"recording {log}: {refused}; restoring without it")
        return Service(Beside.NOTHING, refused=refused)
    if recording.skipped:
        warn(f"recording {log}: {recording.skipped} bad lines skipped")
    offsets = offsets_for(recording, request.snapshot.page_size)
    return Service(Beside.REPLAY, offsets=offsets, skipped=recording.skipped)


@lru_cache(maxsize=32)
def _read_recording(log: Path, memory_bytes: int, *_file: int) -> Recording:
    # A log never changes in place, so parsing it once for each version of the file is enough.
    return read_access_log(log, memory_bytes)


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def words(failure: Exception) -> str:
    """What went wrong, with the file's name where there is one; no errno in figures."""
    if isinstance(failure, OSError) and failure.strerror:
        return f"{failure.filename}: {failure.strerror}" if failure.filename else failure.strerror
    return str(failure)
