"""Restores that fail or are cancelled, at every step of the list: nothing is left, and the text says why."""

from __future__ import annotations

import array
import asyncio
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.system.conftest import Run, left_in
from vmd import limits
from vmd.backend import Request
from vmd.errors import RestoreFailed, TimedOut, VmdError
from vmd.pages.detached import DetachedPages
from vmd.restore import PAGES_SOCKET, STEPS, Seam, Step, restore
from vmd.settings import Settings
from vmd.template import Template
from vmd.vmm.vmm import Vmm

RequestFor = Callable[..., Request]

KINDS = [("file", False), ("uffd", False), ("uffd", True)]

CASES = [
    pytest.param(backend, detached, step, id=f"{backend}-{'detached-' if detached else ''}{step.name.lower()}")
    for backend, detached in KINDS
    for step in STEPS
    if backend == "uffd" or step not in (Step.LISTEN, Step.HANDSHAKE)
]


def failing_at(wanted: Step, failure: BaseException, passed: list[Step]) -> Seam:
    """A seam that notes the steps and raises ``failure`` after ``wanted``."""

    async def at(step: Step) -> None:
        passed.append(step)
        if step is wanted:
            raise failure

    return at


def expected_steps(backend: str, last: Step) -> list[Step]:
    steps = list(STEPS[: STEPS.index(last) + 1])
    return [step for step in steps if backend == "uffd" or step not in (Step.LISTEN, Step.HANDSHAKE)]


@pytest.mark.seed(40)
@pytest.mark.parametrize(("backend", "detached", "step"), CASES)
def test_a_failure_at_any_step_leaves_nothing(
    backend: str, detached: bool, step: Step, request_for: RequestFor, settings: Settings, run: Run
) -> None:
    passed: list[Step] = []
    at = failing_at(step, VmdError("injected"), passed)
    with pytest.raises(RestoreFailed, match=r"^restore sandbox s1: injected$"):
        run(restore(request_for(backend, detached=detached), settings, at=at))
    assert passed == expected_steps(backend, step)
    assert left_in(settings) == []


@pytest.mark.seed(41)
@pytest.mark.parametrize(("backend", "detached", "step"), CASES)
def test_a_caller_that_goes_away_at_any_step_leaves_nothing(
    backend: str, detached: bool, step: Step, request_for: RequestFor, settings: Settings, run: Run
) -> None:
    passed: list[Step] = []

    async def story() -> None:
        reached = asyncio.Event()

        async def at(now: Step) -> None:
            passed.append(now)
            if now is step:
                reached.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(restore(request_for(backend, detached=detached), settings, at=at))
        await reached.wait()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()  # an impatient caller: the undoing must not be cut short
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left_in(settings) == []

    run(story())
    assert passed == expected_steps(backend, step)


@pytest.mark.parametrize(("backend", "detached"), KINDS)
def test_a_bug_leaves_nothing_and_is_not_dressed_up(
    backend: str, detached: bool, request_for: RequestFor, settings: Settings, run: Run
) -> None:
    at = failing_at(Step.READY, ZeroDivisionError("bug"), [])
    with pytest.raises(ZeroDivisionError, match="bug"):
        run(restore(request_for(backend, detached=detached), settings, at=at))
    assert left_in(settings) == []


async def stopped_vmm(settings: Settings, step: Step) -> None:
    """Freeze the VMM that this step has made: it will not answer."""
    if step is Step.SPAWN:
        os.kill(vmm_pid(settings), signal.SIGSTOP)


def vmm_pid(settings: Settings) -> int:
    (line,) = (line for line in left_in(settings) if line.startswith("vmm "))
    return int(line.split()[1])


@pytest.mark.seed(39)
@pytest.mark.parametrize(("backend", "detached"), KINDS)
def test_a_load_that_hangs_ends_at_its_bound(
    backend: str, detached: bool, request_for: RequestFor, settings: Settings, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "VMM_LOAD_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(RestoreFailed, match=r"^restore sandbox s1: load snapshot t9: .*no answer within 0\.5 s") as why:
        run(restore(request_for(backend, detached=detached), settings, at=lambda step: stopped_vmm(settings, step)))
    assert isinstance(why.value.__cause__, TimedOut)
    assert time.monotonic() - began < 5
    assert left_in(settings) == []


@pytest.mark.seed(41)
@pytest.mark.parametrize(("backend", "detached"), KINDS)
def test_a_load_that_hangs_is_cancelled_at_once(
    backend: str, detached: bool, request_for: RequestFor, settings: Settings, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> float:
        loading = asyncio.Event()
        real = Vmm.load

        async def load(self: Vmm, *words: object, **keys: object) -> None:
            loading.set()
            await real(self, *words, **keys)  # type: ignore[arg-type]

        monkeypatch.setattr(Vmm, "load", load)
        request = request_for(backend, detached=detached)
        task = asyncio.create_task(restore(request, settings, at=lambda step: stopped_vmm(settings, step)))
        await loading.wait()
        began = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - began

    assert run(story()) < 2
    assert left_in(settings) == []


@pytest.mark.parametrize(("backend", "detached"), KINDS)
@pytest.mark.parametrize("step", [Step.SPAWN, Step.HANDSHAKE, Step.RESUME])
def test_a_vmm_that_dies_fails_the_restore_at_once(
    backend: str, detached: bool, step: Step, request_for: RequestFor, settings: Settings, run: Run
) -> None:
    if backend == "file" and step is Step.HANDSHAKE:
        step = Step.LOAD

    async def at(now: Step) -> None:
        if now is step:
            os.kill(vmm_pid(settings), signal.SIGKILL)

    began = time.monotonic()
    with pytest.raises(RestoreFailed, match=r"^restore sandbox s1: "):
        run(restore(request_for(backend, detached=detached), settings, at=at))
    assert time.monotonic() - began < 5
    assert left_in(settings) == []


@pytest.mark.parametrize("backend", ["file", "uffd"])
def test_firecrackers_own_words_are_kept(
    backend: str, request_for: RequestFor, template: Template, settings: Settings, run: Run
) -> None:
    vmstate = template.directory / "vmstate"
    content = bytearray(vmstate.read_bytes())
    content[len(content) // 2] ^= 0xFF
    vmstate.unlink()
    vmstate.write_bytes(content)
    began = time.monotonic()
    with pytest.raises(RestoreFailed, match=r"^restore sandbox s1: load snapshot t9: .*CRC64") as why:
        run(restore(request_for(backend), settings))
    assert "status 400" in str(why.value)
    assert time.monotonic() - began < 5
    assert left_in(settings) == []


def lie(settings: Settings, body: bytes) -> None:
    """Connect to the restore's page server before its VMM does, and send a handshake that is wrong."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(str(settings.run_dir / "s1" / PAGES_SOCKET))
        with Path("/dev/null").open("rb") as fd:
            peer.sendmsg([body], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd.fileno()]))])


@pytest.mark.seed(9)
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("loads", [True, False], ids=["load-succeeds", "load-hangs"])
def test_a_wrong_handshake_fails_the_restore_whatever_the_load_does(
    detached: bool,
    loads: bool,
    request_for: RequestFor,
    settings: Settings,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def load(self: Vmm, *words: object, **keys: object) -> None:
        if not loads:
            await asyncio.Event().wait()

    async def at(step: Step) -> None:
        if step is Step.LISTEN:
            lie(settings, b"[]")

    monkeypatch.setattr(Vmm, "load", load)
    began = time.monotonic()
    with pytest.raises(RestoreFailed, match=r"^restore sandbox s1: handshake: ") as why:
        run(restore(request_for(detached=detached), settings, at=at))
    assert time.monotonic() - began < 5
    assert "no answer" not in str(why.value)
    assert left_in(settings) == []


def test_a_load_without_a_handshake_ends_at_its_bound(
    request_for: RequestFor, settings: Settings, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def load(self: Vmm, *words: object, **keys: object) -> None:
        """Says yes and did nothing."""

    monkeypatch.setattr(Vmm, "load", load)
    monkeypatch.setattr(limits, "VMM_LOAD_SECONDS", 0.1)
    monkeypatch.setattr(limits, "HANDSHAKE_PEER_SECONDS", 0.2)
    with pytest.raises(RestoreFailed, match=r"^restore sandbox s1: handshake: the VMM sent none within 0\.3 s$"):
        run(restore(request_for(), settings))
    assert left_in(settings) == []


def test_a_page_server_process_that_hangs_is_killed(request_for: RequestFor, settings: Settings, run: Run) -> None:
    made: list[int] = []
    spawned = DetachedPages.__init__

    def note(self: DetachedPages, *words: object, **keys: object) -> None:
        spawned(self, *words, **keys)  # type: ignore[arg-type]
        made.append(self.pid)

    async def at(step: Step) -> None:
        if step is Step.READY:
            os.kill(made[0], signal.SIGSTOP)
            raise VmdError("injected")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetachedPages, "__init__", note)
        began = time.monotonic()
        with pytest.raises(RestoreFailed, match="injected"):
            run(restore(request_for(detached=True), replace(settings, core="reference"), at=at))
    assert time.monotonic() - began < 5
    assert left_in(settings) == []


def test_an_existing_run_directory_is_left_alone(request_for: RequestFor, settings: Settings, run: Run) -> None:
    directory = settings.run_dir / "s1"
    directory.mkdir()
    (directory / "somebody.s").touch()
    with pytest.raises(RestoreFailed, match=re.escape(f"make the run directory: {directory} exists")):
        run(restore(request_for(), settings))
    assert [path.name for path in directory.iterdir()] == ["somebody.s"]
    (directory / "somebody.s").unlink()
