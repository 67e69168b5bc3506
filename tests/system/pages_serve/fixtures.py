"""What the tests of `vmd pages serve` start from."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from tests.fakes.vmm import FakeVmm, Span
from tests.system.pages_serve.command import (
    PAIR_PAGES,
    Adopt,
    Adopter,
    Journalled,
    MakeJournalled,
    MakeMemory,
    MakeVmm,
    PageServer,
    Serve,
)
from tests.system.pages_serve.machine import Frozen, MakeThawed, Thawed, freeze
from tests.system.pages_serve.pages import PAGE


@pytest.fixture
def serve_pages(run_dir: Path, tmp_path: Path) -> Iterator[Serve]:
    """Run the command; at the end of the test it is killed. A server that ended must have left nothing."""
    numbers = count()
    with ExitStack() as stack:

        def start(
            memory: Path,
            *options: str | Path,
            core: str = "native",
            socket: Path | None = None,
            ready: bool = True,
            env: Mapping[str, str] | None = None,
        ) -> PageServer:
            number = next(numbers)
            directory = tmp_path / f"server-{number}"
            directory.mkdir()
            socket = socket or run_dir / f"{number}.sock"
            server = PageServer(directory, socket, memory, options, {"VMD_CORE": core, **(env or {})})
            stack.callback(server.close)
            return server.wait_ready() if ready else server

        yield start


@pytest.fixture
def make_memory(tmp_path: Path) -> MakeMemory:
    """Write a memory file: ``make_memory(pages, holes=(), page_size=4096, directory=...)``; no two pages alike."""
    numbers = count()

    def make(pages: int, holes: Collection[int] = (), *, page_size: int = PAGE, directory: Path = tmp_path) -> Path:
        path = directory / f"memory-{next(numbers)}"
        with path.open("wb") as file:
            file.truncate(pages * page_size)
            for page in sorted(set(range(pages)) - set(holes)):
                os.pwrite(file.fileno(), (page + 1).to_bytes(8, "little") * (page_size // 8), page * page_size)
        return path

    return make


@pytest.fixture
def make_vmm() -> Iterator[MakeVmm]:
    """Start a fake VMM: ``make_vmm(memory, spans=None, page_size=4096)``; one region over the whole file by default."""
    with ExitStack() as stack:

        def make(memory: Path, spans: Sequence[Span] | None = None, page_size: int = PAGE) -> FakeVmm:
            spans = spans or [Span(memory.stat().st_size // page_size, 0)]
            return stack.enter_context(FakeVmm(memory, spans, page_size))

        yield make


@pytest.fixture(scope="session")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    """A snapshot of the built-in guest, of 128 MiB."""
    return freeze(tmp_path_factory.mktemp("frozen"))


@pytest.fixture
def make_thawed(tmp_path: Path) -> Iterator[MakeThawed]:
    """Start a Firecracker that waits for its snapshot."""
    numbers = count()
    with ExitStack() as stack:

        def make() -> Thawed:
            vmm = Thawed(tmp_path / f"vmm-{next(numbers)}")
            stack.enter_context(vmm)
            return vmm

        yield make


@pytest.fixture
def pair(serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm) -> tuple[PageServer, FakeVmm]:
    """A page server that waits, and a VMM with one region over its whole memory file."""
    memory = make_memory(PAIR_PAGES)
    return serve_pages(memory), make_vmm(memory)


@pytest.fixture
def make_journalled(
    serve_pages: Serve, make_memory: MakeMemory, make_vmm: MakeVmm, run_dir: Path
) -> Iterator[MakeJournalled]:
    """Start a VMM and a page server that keeps a journal. Where the server was killed, its journal is removed."""
    made: list[Journalled] = []

    def make(*options: str | Path, pages: int = 64, holes: Collection[int] = ()) -> Journalled:
        journal = run_dir / f"journal-{len(made)}"
        memory = make_memory(pages, holes)
        server, vmm = serve_pages(memory, "--journal", journal, *options), make_vmm(memory)
        vmm.handshake(server.socket)
        server.when(state="serving")
        made.append(Journalled(server, vmm, memory, journal))
        return made[-1]

    yield make
    for world in made:
        world.journal.unlink(missing_ok=True)


@pytest.fixture
def adopt_pages(tmp_path: Path) -> Iterator[Adopt]:
    """Run the command; at the end of the test it is killed."""
    numbers = count()
    with ExitStack() as stack:

        def start(pid: int, journal: Path, *options: str | Path, ready: bool = True) -> Adopter:
            directory = tmp_path / f"adopter-{next(numbers)}"
            directory.mkdir()
            adopter = Adopter(directory, pid, journal, options)
            stack.callback(adopter.close)
            return adopter.wait_ready() if ready else adopter

        yield start
