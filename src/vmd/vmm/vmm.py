"""One Firecracker process: spawned, driven, killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from .. import limits
from ..errors import VmmError
from . import process
from .api import Api
from .console import Console


class Vmm:
    """A VMM that runs, with its API connected. Made by `spawn`; ended by `kill` or given away by `close`.

    ``directory`` is the VMM's working directory: paths given to it are absolute or relative to
    that. Errors are `VmmError` and `TimedOut`; every wait ends at once when the VMM dies.
    """

    def __init__(self, started: process.Started, directory: Path) -> None:
        self.pid = started.pid
        self.start_time = started.start_time
        self.pidfd = started.pidfd
        self._log = started.log
        self.directory = directory
        self.console = Console(directory, self.alive)
        self.api = Api(directory / process.API_SOCKET)

    @classmethod
    async def spawn(cls, firecracker: str, directory: Path, vm_id: str, *, dies_with_parent: bool) -> Vmm:
        """Start Firecracker in ``directory`` (made when absent) and connect to its API.

        ``dies_with_parent``: the VMM is killed when the calling thread ends. When this fails or is
        cancelled, the process is gone and so is every file that it and we made.
        """
        fresh = _make(directory)
        vmm = None
        try:
            started = process.start(firecracker, directory, vm_id, dies_with_parent=dies_with_parent)
            vmm = cls(started, directory)
            await vmm._connect(vm_id)
        except BaseException:
            try:
                if vmm is not None:
                    await vmm.kill()
            finally:
                if vmm is not None:
                    process.clean(directory)
                if fresh:
                    directory.rmdir()
            raise
        return vmm

    async def boot(
        self, *, kernel: Path, boot_args: str, mem_mib: int, huge_pages: bool, balloon: bool = False
    ) -> None:
        """Boot ``kernel`` with one vCPU and ``mem_mib`` MiB; returns when the guest has begun to run.

        ``huge_pages``: back guest memory with 2 MiB pages, which the host must have reserved. ``balloon``: give the
        guest a balloon, empty at first; Firecracker 1.12 refuses it together with 2 MiB pages.
        """
        await self._put("/machine-config", {
            "vcpu_count": 1,
            "mem_size_mib": mem_mib,
            "track_dirty_pages": False,
            "huge_pages": "2M" if huge_pages else "None",
        })  # fmt: skip
        if balloon:
            await self._put("/balloon", {"amount_mib": 0, "deflate_on_oom": False})
        await self._put("/boot-source", {"kernel_image_path": str(kernel), "boot_args": boot_args})
        await self._put("/actions", {"action_type": "InstanceStart"})

    async def set_balloon(self, mib: int) -> None:
        """Ask the guest to give up ``mib`` MiB in all; its driver follows in its own time.

        `VmmError` when the VM has no balloon, when its guest has not set it up, and beyond the guest's memory.
        """
        await self.api.request("PATCH", "/balloon", {"amount_mib": mib}, seconds=limits.VMM_REQUEST_SECONDS)

    async def pause(self) -> None:
        """Stop the guest's vCPU."""
        await self.api.request("PATCH", "/vm", {"state": "Paused"}, seconds=limits.VMM_REQUEST_SECONDS)

    async def resume(self) -> None:
        """Let the guest's vCPU run (again)."""
        await self.api.request("PATCH", "/vm", {"state": "Resumed"}, seconds=limits.VMM_REQUEST_SECONDS)

    async def snapshot(self, vmstate: Path, memory: Path) -> None:
        """Write a Full snapshot of the paused VM into two files."""
        body = {"snapshot_type": "Full", "snapshot_path": str(vmstate), "mem_file_path": str(memory)}
        await self._put("/snapshot/create", body, limits.VMM_SNAPSHOT_SECONDS)

    async def load(
        self,
        vmstate: Path,
        *,
        backend: Literal["File", "Uffd"],
        backend_path: str,
        resume: bool,
        seconds: float = limits.VMM_LOAD_SECONDS,
    ) -> None:
        """Load a snapshot into this fresh VMM.

        ``backend_path``: the memory file (File), or the page server's socket (Uffd), which must be
        serving already: the load itself faults. ``resume``: let the guest run at once.
        """
        body = {
            "snapshot_path": str(vmstate),
            "mem_backend": {"backend_type": backend, "backend_path": backend_path},
            "enable_diff_snapshots": False,
            "resume_vm": resume,
        }
        await self._put("/snapshot/load", body, seconds)

    async def version(self) -> str:
        """Firecracker's version, for example ``1.12.1``."""
        reply = await self.api.request("GET", "/version", None, seconds=limits.VMM_REQUEST_SECONDS)
        version = (reply or {}).get("firecracker_version")
        if not isinstance(version, str):
            raise VmmError(f"GET /version: no firecracker_version in {reply!r}")
        return version

    def alive(self) -> bool:
        """Whether the process runs; a zombie does not. False after `kill` and `close`."""
        return self.pidfd >= 0 and not process.is_dead(self.pidfd)

    async def exited(self) -> None:
        """Wait, without bound, until the process has ended."""
        if self.pidfd >= 0:
            await process.exited(self.pidfd)

    async def kill(self) -> None:
        """Kill the process, wait for its end, reap it. Idempotent. Its files stay: they are the owner's."""
        if self.pidfd >= 0:
            await process.kill(self.pidfd)
        self.close()

    def close(self) -> None:
        """Drop our descriptors and leave the VM running; what it logs at its death is then lost. Idempotent."""
        self.api.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            os.close(self._log)
            self.pidfd = -1

    async def _connect(self, vm_id: str) -> None:
        try:
            await self.api.connect(limits.VMM_SOCKET_SECONDS, self.alive)
        except VmmError as failure:
            log = process.log_tail(self.directory)
            raise VmmError(f"spawn {vm_id}: {failure}" + (f"; its log ends: {log}" if log else "")) from failure

    async def _put(self, path: str, body: dict[str, Any], seconds: float = limits.VMM_REQUEST_SECONDS) -> None:
        await self.api.request("PUT", path, body, seconds=seconds)


def _make(directory: Path) -> bool:
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        return False
    except OSError as failure:
        raise VmmError(f"make {directory}: {failure.strerror}") from failure
    return True
