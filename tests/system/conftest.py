"""Fixtures on real Firecracker; they are the flow: template, then what is restored from it."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from vmd import slots
from vmd import template as templates
from vmd.backend import Request
from vmd.pager import start
from vmd.settings import Settings
from vmd.template import Shape, Template

T = TypeVar("T")

NAME = "t9"
START = "sweep pages=512 span=4096"
SHAPE = Shape(mem_mib=64, start=START)

VMD = Path(sys.executable).with_name("vmd")

_HUGE_POOL = Path("/proc/sys/vm/nr_hugepages")
_HUGE_LOCK = Path("/tmp/vmd-tests-hugepages.lock")

# Room for a 64 MiB guest twice: one is being torn down while the next one is made.
_HUGE_PAGES = 64


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test here needs KVM and userfaultfd."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.needs_kvm)
            item.add_marker(pytest.mark.needs_uffd)


class Run(Protocol):
    """``run(coroutine)``: its result; a loop of its own."""

    def __call__(self, work: Coroutine[Any, Any, T]) -> T: ...


@pytest.fixture
def run() -> Run:
    def run_(work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(work)

    return run_


@pytest.fixture
def settings(run_dir: Path, state_dir: Path) -> Settings:
    """The test's environment, as every command reads it."""
    return Settings.read()


@pytest.fixture(scope="session")
def built(session_dirs: tuple[Path, Path]) -> Template:
    """A template of `SHAPE`, built once a session."""
    with tempfile.TemporaryDirectory(prefix="vmd-", dir="/dev/shm") as run_root:
        state_root = tempfile.mkdtemp(prefix="built-", dir=session_dirs[1])  # tests of other folders may have one too
        settings = replace(Settings.read(), run_dir=Path(run_root), state_dir=Path(state_root))
        template = asyncio.run(templates.build(settings, NAME, SHAPE, warn=_must_not_warn))
    assert template.recording_ended == "settled"
    return template


def _must_not_warn(line: str) -> None:
    raise AssertionError(line)


@pytest.fixture
def template(built: Template, settings: Settings) -> Template:
    """The same template in the test's own state directory: hard links, so that a test may remove or replace them."""
    directory = settings.state_dir / "templates" / NAME
    directory.mkdir(parents=True)
    for file in built.directory.iterdir():
        (directory / file.name).hardlink_to(file)
    return templates.load(settings, NAME)


@pytest.fixture
def request_for(template: Template) -> Callable[..., Request]:
    """``request_for(backend, **fields)``: a request to restore the template as sandbox ``s1``."""

    def make(backend: str = "uffd", **fields: Any) -> Request:
        values = {"sandbox_id": "s1", "access_log": template.access_log, **fields}
        return Request(name=NAME, snapshot=template.snapshot, backend=backend, **values)  # type: ignore[arg-type]

    return make


class Cli:
    """Runs the installed ``vmd`` in the test's environment."""

    def __call__(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end; both streams as text."""
        return subprocess.run(
            [VMD, *words], capture_output=True, text=True, timeout=100, check=False, env={**os.environ, **env}
        )

    def json(self, *words: str, **env: str) -> Any:
        """Run it with ``--json``; it must succeed, say nothing on stderr, and print one JSON value."""
        at = words.index("--") if "--" in words else len(words)
        done = self(*words[:at], "--json", *words[at:], **env)
        assert (done.returncode, done.stderr) == (0, ""), done
        return json.loads(done.stdout)

    def start(self, *words: str, **env: str) -> subprocess.Popen[bytes]:
        """Start it, both streams to nowhere."""
        return subprocess.Popen(
            [VMD, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **env}
        )


@pytest.fixture
def vmd(settings: Settings) -> Iterator[Cli]:
    """The command line; sandboxes that the test left are killed at its end."""
    cli = Cli()
    yield cli
    cli("kill", "--all")


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """2 MiB pages reserved on the host, and returned."""
    before = _change_pool(_HUGE_PAGES)
    gained = int(_HUGE_POOL.read_text()) - before
    try:
        if gained < _HUGE_PAGES:
            pytest.skip(f"the host gives {gained} of {_HUGE_PAGES} huge pages")
        yield
    finally:
        _change_pool(-gained)


def _change_pool(by: int) -> int:
    with _HUGE_LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(_HUGE_POOL.read_text())
        _HUGE_POOL.write_text(str(max(0, before + by)))
        return before


def evict(file: Path) -> None:
    """Drop the file from the page cache."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def numbers(answer: str) -> dict[str, int]:
    """``ok pages=3 wrong=0`` as a dictionary of its whole numbers."""
    assert answer.startswith("ok "), answer
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)\b", answer)}


def vmms_in(directory: Path) -> list[int]:
    """Pids of the living processes that work in ``directory`` or below it: VMMs, and nothing else does."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                cwd = (entry / "cwd").readlink()
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            except OSError:
                continue
            if alive and (cwd == directory or directory in cwd.parents):
                found.append(int(entry.name))
    return found


SHARED = (slots.FILE, start.SOCKET, start.LOCK, start.LOG)


def pager_pids(settings: Settings) -> dict[str, int]:
    """The pids of ``pager`` and, when it is ready, ``standby``."""
    control = start.running(settings)
    assert control is not None
    with control:
        words = [line.split() for line in control.status().splitlines()]
    return {word[0]: int(word[1]) for word in words if word[0] == "pager" or word[2:] == ["ready"]}


def left_in(settings: Settings) -> list[str]:
    """What a restore would have left: VMMs, entries of the run directory, records of sandboxes.

    The pager is nobody's own: it ends when it has had nothing to serve for a while, and its files with it.
    """
    left = [f"vmm {pid}" for pid in vmms_in(settings.run_dir)]
    for directory in (settings.run_dir, settings.state_dir / "sandboxes"):
        left += [str(path) for path in directory.glob("*") if path.name not in SHARED]
    return left
