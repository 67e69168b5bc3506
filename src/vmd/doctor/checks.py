"""The questions of `vmd doctor`, each answered by trying.

``ok`` is false for what vmd cannot do without: firecracker, a guest that runs (KVM), userfaultfd, a
state directory that can be written, a kernel of 6.1 or newer, the core that was asked for. What it
can do without is ok even when it is missing, and has a ``fix`` all the same: that is a warning. So
``ok`` of the whole is that of all its checks.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from .. import guest, limits
from ..errors import VmdError
from ..host import filesystem, kernel
from ..pages import uffd
from ..pages.cores import core_name
from ..settings import Settings
from ..store import require_private
from ..vmm.process import find_firecracker, find_jailer
from ..vmm.vmm import Vmm
from . import faults

TESTED_FIRECRACKER = "1.12.1"
OLDEST_KERNEL = (6, 1)

_GUEST_MIB = 16
_VERSION_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer. ``fix`` says how to make it better, None when there is nothing to."""

    name: str
    ok: bool
    detail: str
    fix: str | None = None

    @property
    def warns(self) -> bool:
        """It works, and could be better."""
        return self.ok and self.fix is not None


async def examine(settings: Settings) -> list[Check]:
    """Answer every question, in the order of `_QUESTIONS`. Raises nothing, leaves nothing."""
    return [await _ask(name, question, settings) for name, question in _QUESTIONS.items()]


_Question = Callable[[str, Settings], Check | Awaitable[Check]]


async def _ask(name: str, question: _Question, settings: Settings) -> Check:
    try:
        answer = question(name, settings)
        return await answer if inspect.isawaitable(answer) else answer
    except VmdError as failure:
        return Check(name, False, str(failure), failure.hint)
    except Exception as failure:  # one bad answer must not hide the others
        return Check(name, False, f"{type(failure).__name__}: {failure}", "report this: the question itself failed")


# --- programs --------------------------------------------------------------------------------


def _firecracker(name: str, settings: Settings) -> Check:
    path = find_firecracker(settings)
    version = _version(path)
    if version == TESTED_FIRECRACKER:
        return Check(name, True, f"{version} at {path}")
    return Check(name, True, f"{version} at {path}", f"{TESTED_FIRECRACKER} is the version that vmd is tested with")


def _jailer(name: str, settings: Settings) -> Check:
    try:
        path = find_jailer(settings)
    except VmdError as missing:
        return Check(name, True, f"{missing}; sandboxes run without a jail", missing.hint)
    return Check(name, True, f"{_version(path)} at {path}")


def _version(path: str) -> str:
    """What follows the v in the first line of ``PATH --version``: ``Firecracker v1.12.1``."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, timeout=_VERSION_SECONDS, text=True, check=True)
    except (OSError, subprocess.SubprocessError) as failure:
        raise VmdError(f"{path} --version: {failure}", hint="run `make develop`") from failure
    return said.stdout.partition("\n")[0].rpartition(" ")[2].removeprefix("v")


def _core(name: str, settings: Settings) -> Check:
    if core_name(settings.core) == "reference":
        fix = "build the native core with `make develop`" if settings.core is None else "unset VMD_CORE"
        return Check(name, True, "reference (slow): no journal, no take-over", fix)
    import vmd_core

    if vmd_core.PROFILE != "release":
        return Check(name, True, f"native {vmd_core.VERSION}, {vmd_core.PROFILE} build", "build it with --release")
    return Check(name, True, f"native {vmd_core.VERSION}")


# --- kernel ----------------------------------------------------------------------------------


async def _kvm(name: str, settings: Settings) -> Check:
    """Proven by a guest that runs: there are hosts whose /dev/kvm opens, and whose guests die."""
    load = "load kvm_intel or kvm_amd; inside a virtual machine, have its host allow nested virtualization"
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError as failure:
        return Check(name, False, f"/dev/kvm: {failure.strerror}", "run as root, or join the group that owns /dev/kvm")
    except OSError as failure:
        return Check(name, False, f"/dev/kvm: {failure.strerror}", load)
    kernel_image, firecracker = guest.kernel(), find_firecracker(settings)
    began = asyncio.get_running_loop().time()
    try:
        await _run_guest(firecracker, kernel_image)
    except VmdError as failure:
        return Check(name, False, f"the built-in guest does not run: {failure}", load)
    took = asyncio.get_running_loop().time() - began
    return Check(name, True, f"the built-in guest booted and answered in {took * 1000:.0f} ms")


async def _run_guest(firecracker: str, kernel_image: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="vmd-doctor-") as directory:
        vmm = await Vmm.spawn(firecracker, Path(directory, "vm"), "doctor", dies_with_parent=True)
        try:
            await vmm.boot(kernel=kernel_image, boot_args="seed=1 fill=75", mem_mib=_GUEST_MIB, huge_pages=False)
            await vmm.console.wait_line("ready", limits.GUEST_READY_SECONDS)
            answer = await vmm.console.ask("ping", limits.GUEST_READY_SECONDS)
        finally:
            await vmm.kill()
    if answer != "pong":
        raise VmdError(f"ping was answered {answer[:80]!r}")


def _userfaultfd(name: str, _: Settings) -> Check:
    device, ptrace = Path("/dev/userfaultfd").exists(), kernel.has_capability(kernel.CAP_SYS_PTRACE)
    try:
        took = faults.serve()
    except (OSError, VmdError) as failure:
        fix = "run as root or give CAP_SYS_PTRACE" if not device else "give this user access to /dev/userfaultfd"
        return Check(name, False, f"no fault could be served: {failure}", fix)
    way = "/dev/userfaultfd" if device else "CAP_SYS_PTRACE" if ptrace else "vm.unprivileged_userfaultfd"
    return Check(name, True, f"a fault was served in {took * 1e6:.0f} µs, by {way}")


def _take_over(name: str, _: Settings) -> Check:
    try:
        faults.take_over()
    except (OSError, VmdError) as failure:
        fix = "run as root with CAP_SYS_PTRACE, and kernel.yama.ptrace_scope below 3"
        return Check(name, True, f"a VM whose page server died cannot be taken over: {failure}", fix)
    return Check(name, True, "the userfaultfd of another process was taken and served")


def _huge_pages(name: str, _: Settings) -> Check:
    pool = kernel.huge_pages()
    if pool is None:
        return Check(name, True, "this kernel has no pages of 2 MiB", "enable CONFIG_HUGETLBFS to use --page-size 2M")
    fix = None if pool.free else "sysctl vm.nr_hugepages=512 reserves 1 GiB; needed for --page-size 2M only"
    return Check(name, True, f"{pool.free} of {pool.total} pages of 2 MiB are free", fix)


def _kernel(name: str, _: Settings) -> Check:
    ok = kernel.release() >= OLDEST_KERNEL
    return Check(name, ok, f"Linux {os.uname().release}", None if ok else "Linux 6.1 is the oldest that vmd runs on")


def _feature(have: Callable[[], bool], what: str, since: str, without: str) -> _Question:
    """A kernel feature that there is a way round."""

    def ask(name: str, _: Settings) -> Check:
        if have():
            return Check(name, True, what)
        return Check(name, True, f"missing: {without}", f"Linux {since} has it")

    return ask


# --- directories -----------------------------------------------------------------------------


def _state_dir(name: str, settings: Settings) -> Check:
    """Zeros of a snapshot are kept as holes: a template takes the space of what its guest wrote."""
    for part in (settings.state_dir, settings.state_dir / "templates", settings.state_dir / "sandboxes"):
        require_private(part)
    directory = filesystem.nearest(settings.state_dir)
    kind = filesystem.kind(directory)
    try:
        holes = filesystem.keeps_holes(directory)
    except OSError as failure:
        fix = "make it writable, or set VMD_STATE_DIR"
        return Check(name, False, f"{settings.state_dir} ({kind}): {failure.strerror}", fix)
    free = os.statvfs(directory)
    detail = f"{settings.state_dir} ({kind}), {free.f_bavail * free.f_frsize >> 30} GiB free"
    if holes:
        return Check(name, True, f"{detail}, keeps holes")
    return Check(name, True, f"{detail}, cannot keep holes: snapshots take all their size", "use ext4, xfs or btrfs")


def _run_dir(name: str, settings: Settings) -> Check:
    require_private(settings.run_dir)
    directory = filesystem.nearest(settings.run_dir)
    kind = filesystem.kind(directory)
    if not os.access(directory, os.W_OK | os.X_OK):
        detail = f"{settings.run_dir} ({kind}): cannot be written"
        return Check(name, False, detail, "make it writable, or set VMD_RUN_DIR")
    fix = None if kind == "tmpfs" else "set VMD_RUN_DIR to a directory on a tmpfs: journals are memory, not files"
    return Check(name, True, f"{settings.run_dir} ({kind})", fix)


_QUESTIONS: dict[str, _Question] = {
    "firecracker": _firecracker,
    "kvm": _kvm,
    "userfaultfd": _userfaultfd,
    "take-over": _take_over,
    "core": _core,
    "state-dir": _state_dir,
    "run-dir": _run_dir,
    "huge-pages": _huge_pages,
    "jailer": _jailer,
    "kernel": _kernel,
    "so-peerpidfd": _feature(
        kernel.has_peerpidfd, "a peer is known by its pidfd", "6.5", "a peer is known by pid and start time"
    ),
    "uffdio-poison": _feature(
        lambda: bool(faults.features() & uffd.FEATURE_POISON),
        "a page that cannot be read is poisoned",
        "6.6",
        "a VM is killed for a page that cannot be read",
    ),
    "pagemap-scan": _feature(
        kernel.has_pagemap_scan, "dirty pages are told from outside", "6.7", "dirty pages cost a guest exit each"
    ),
}
