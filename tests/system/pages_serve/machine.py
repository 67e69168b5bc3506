"""A real Firecracker with the built-in guest: frozen once, thawed through a page server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.guest.vmm import Vmm, figures, firecracker

KERNEL = Path(__file__).parents[3] / "src" / "vmd" / "guest" / "micro.elf"
MIB = 128


@dataclass(frozen=True)
class Frozen:
    """A snapshot of the built-in guest. ``memory`` is sparse: runs of zeros are holes."""

    state: Path
    memory: Path
    pages: int


class Thawed(Vmm):
    """A VMM that loads a snapshot through the page server at a socket."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def thaw(self, frozen: Frozen, socket: Path, *, resume: bool = True) -> None:
        backend = {"backend_type": "Uffd", "backend_path": str(socket)}
        self.call("PUT", "/snapshot/load", snapshot_path=str(frozen.state), mem_backend=backend, resume_vm=resume)

    def is_right(self) -> bool:
        """Whether every word of the guest's memory is what it must be; touches all of it."""
        return figures(self.ask("check"))["wrong"] == 0


class Jailed(Thawed):
    """A VMM in the chroot ``root``, as a user of its own. Give it paths relative to that."""

    def __init__(self, directory: Path, uid: int, gid: int) -> None:
        self._binary = Path(firecracker()).resolve()
        self.root = directory / self._binary.name / "t1" / "root"
        self._ids = ["--id", "t1", "--uid", str(uid), "--gid", str(gid), "--chroot-base-dir", str(directory)]
        super().__init__(directory)

    def _words(self) -> list[str]:
        jailer = os.environ.get("VMD_JAILER") or str(Path(sys.prefix) / "bin" / "jailer")
        return [
            jailer,
            "--exec-file",
            str(self._binary),
            *self._ids,
            "--",
            "--api-sock",
            "api.sock",
            "--level",
            "Error",
        ]

    def _socket(self) -> Path:
        return self.root / "api.sock"


MakeThawed = Callable[[], Thawed]


def freeze(directory: Path, page_size: str = "None") -> Frozen:
    """Boot the guest and take its snapshot."""
    with Vmm(directory) as vmm:
        vmm.call("PUT", "/machine-config", vcpu_count=1, mem_size_mib=MIB, huge_pages=page_size)
        vmm.call("PUT", "/boot-source", kernel_image_path=str(KERNEL), boot_args="reboot=k seed=7")
        vmm.call("PUT", "/actions", action_type="InstanceStart")
        assert vmm.line().startswith("ready micro 1 ")
        state, dense = vmm.snapshot()
    memory = directory / "sparse"
    make_sparse(dense, memory)
    dense.unlink()
    return Frozen(state, memory, memory.stat().st_size // os.sysconf("SC_PAGESIZE"))


def make_sparse(source: Path, target: Path) -> None:
    """Copy a file and leave holes where it is zero."""
    block = 1 << 16
    with source.open("rb") as read, target.open("wb") as write:
        while data := read.read(block):
            if any(data):
                write.seek(read.tell() - len(data))
                write.write(data)
        write.truncate(read.tell())
