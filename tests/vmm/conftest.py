"""Real Firecrackers for the tests of `vmd.vmm`: a booted one, and a snapshot to load."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import pytest

from vmd.settings import Settings
from vmd.vmm.process import find_firecracker
from vmd.vmm.vmm import Vmm

T = TypeVar("T")
Spawn = Callable[[], AbstractAsyncContextManager[Vmm]]

MEM_MIB = 16


@pytest.fixture(scope="session")
def firecracker() -> str:
    return find_firecracker(Settings.read())


@pytest.fixture(scope="session")
def micro() -> Path:
    path = Path(str(resources.files("vmd") / "guest" / "micro.elf"))
    assert path.is_file(), "the built-in guest is not built: make -C guest/micro"
    return path


@pytest.fixture
def vm_dir(run_dir: Path) -> Iterator[Path]:
    """Where a VM goes; not there yet, and removed with all that is in it."""
    path = run_dir / "vm"
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def spawned(firecracker: str, vm_dir: Path) -> Spawn:
    """Makes a VMM without a guest; killed at the end."""

    @asynccontextmanager
    async def make() -> AsyncIterator[Vmm]:
        vmm = await Vmm.spawn(firecracker, vm_dir, "t1", dies_with_parent=False)
        try:
            yield vmm
        finally:
            await vmm.kill()

    return make


@pytest.fixture
def booted(spawned: Spawn, micro: Path) -> Spawn:
    """Makes a VMM whose built-in guest is ready."""

    @asynccontextmanager
    async def make() -> AsyncIterator[Vmm]:
        async with spawned() as vmm:
            await boot(vmm, micro)
            yield vmm

    return make


async def boot(vmm: Vmm, micro: Path) -> str:
    await vmm.boot(kernel=micro, boot_args="seed=1 fill=75", mem_mib=MEM_MIB, huge_pages=False)
    return await vmm.console.wait_line("ready", 30)


@pytest.fixture(scope="session")
def frozen(firecracker: str, micro: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """``(vmstate, memory)`` of the ready built-in guest."""
    directory = tmp_path_factory.mktemp("frozen")

    async def freeze() -> None:
        vmm = await Vmm.spawn(firecracker, directory / "vm", "t0", dies_with_parent=True)
        try:
            await boot(vmm, micro)
            await vmm.pause()
            await vmm.snapshot(directory / "vmstate", directory / "memory")
        finally:
            await vmm.kill()

    run(freeze())
    return directory / "vmstate", directory / "memory"


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run ``work`` in a fresh loop, in debug mode: what it leaves pending is reported."""
    return asyncio.run(work, debug=True)
