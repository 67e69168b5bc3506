"""Sandboxes: owned by this process or detached from it, found, looked at, killed in every state."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.system.conftest import NAME, START, Cli, Run, left_in, numbers, pager_pids, vmms_in
from vmd import sandbox
from vmd.backend import Asked
from vmd.errors import Conflict, NotFound, PagesFailed, UsageError, VmdError, VmmError
from vmd.pager.control import Control
from vmd.sandbox import Sandbox
from vmd.settings import Settings
from vmd.states import State
from vmd.store import RECORD
from vmd.vmm import process

CREATE_KILLS = int(os.environ.get("VMD_TEST_CREATE_KILLS", "6"))
"""How often a `vmd create` is killed in CI."""

pytestmark = pytest.mark.usefixtures("template")


async def end(pid: int) -> None:
    """SIGKILL, and wait until it is gone."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await process.exited(pidfd)
    finally:
        os.close(pidfd)


def all_die(pids: list[int]) -> None:
    """SIGKILL, at one instant: none sees the end of another. Returns when they are gone."""
    pidfds = [os.pidfd_open(pid) for pid in pids]
    for word in (signal.SIGSTOP, signal.SIGKILL):
        for pidfd in pidfds:
            signal.pidfd_send_signal(pidfd, word)
    for pidfd in pidfds:
        eventually(partial(process.is_dead, pidfd), "it is gone")
        os.close(pidfd)


def pids_in(status: str) -> list[int]:
    """Of pager and standby."""
    return [int(words.split()[1]) for words in status.splitlines() if words.startswith(("pager ", "standby "))]


@pytest.mark.parametrize("backend", ["file", "uffd"])
@pytest.mark.parametrize("detached", [False, True])
def test_the_life_of_a_sandbox(backend: Asked, detached: bool, settings: Settings, run: Run) -> None:
    async def story() -> None:
        states = []
        made = await sandbox.create(settings, NAME, backend=backend, detached=detached, warn=pytest.fail)
        try:
            (found,) = sandbox.list_all(settings, pytest.fail)
            assert found.id == made.id
            states += [made.state(), found.state()]
            assert await made.ask("ping", 10) == "pong"
            assert await sandbox.find(settings, made.id[:6]).ask("ping", 10) == "pong"
            assert numbers(await found.ask("check", 60))["wrong"] == 0
            assert (found.record.journal is not None) == (backend == "uffd" and detached)
            assert (found.record.pages is not None) == (backend == "uffd" and not detached)
            assert (made.stats() is not None) == (backend == "uffd")
        finally:
            await made.kill()
        states.append(made.state())
        await made.kill()
        assert states == [State.RUNNING, State.RUNNING, State.DEAD]
        assert sandbox.list_all(settings) == []
        with pytest.raises(NotFound, match=f"sandbox {made.id}: there is none"):
            sandbox.find(settings, made.id)

    run(story())
    assert left_in(settings) == []


@pytest.mark.parametrize("backend", ["file", "uffd"])
@pytest.mark.parametrize("detached", [False, True])
def test_a_dead_sandbox_is_seen_and_can_be_cleaned_up(
    backend: Asked, detached: bool, settings: Settings, run: Run
) -> None:
    async def story() -> None:
        made = await sandbox.create(settings, NAME, backend=backend, detached=detached)
        await end(made.record.vmm.pid)
        assert made.state() is State.DEAD
        assert sandbox.find(settings, made.id).state() is State.DEAD
        with pytest.raises(Conflict, match=rf"exec {made.id}: the sandbox is dead: its VMM has exited"):
            await made.ask("ping", 10)
        await made.kill()

    run(story())
    assert left_in(settings) == []


def test_a_sandbox_whose_page_servers_all_died_is_frozen_until_there_is_another(settings: Settings, run: Run) -> None:
    async def story() -> None:
        made = await sandbox.create(settings, NAME, backend="uffd", detached=True)
        try:
            eventually(lambda: "standby" in pager_pids(settings), "there is a standby")
            all_die(list(pager_pids(settings).values()))
            assert made.state() is State.FROZEN
            with pytest.raises(Conflict, match=rf"exec {made.id}: the sandbox is frozen: its page server is gone"):
                await made.ask(START, 10)
            sandbox.recover(settings)
            assert made.state() is State.RUNNING
            assert " wrong=0" in await made.ask("check", 60)
        finally:
            await made.kill()

    run(story())
    assert left_in(settings) == []


def test_page_servers_that_die_right_after_an_adoption_cost_no_vm(
    settings: Settings, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = Control.status
    died: list[list[int]] = []

    def answer_and_die(control: Control) -> str:
        status = answer(control)
        if not died:
            died.append(pids_in(status))
            all_die(died[0])
        return status

    async def story() -> None:
        made = await sandbox.create(settings, NAME, backend="uffd", detached=True)
        try:
            eventually(lambda: "standby" in pager_pids(settings), "there is a standby")
            all_die(list(pager_pids(settings).values()))
            monkeypatch.setattr(Control, "status", answer_and_die)
            sandbox.recover(settings, pytest.fail)
            assert len(died[0]) == 2
            assert made.state() is State.RUNNING
            assert " wrong=0" in await made.ask("check", 60)
        finally:
            await made.kill()

    run(story())
    assert left_in(settings) == []


def test_detached_children_that_end_are_reaped_by_the_next_command(settings: Settings, run: Run) -> None:
    async def story() -> None:
        made = await sandbox.create(settings, NAME, backend="uffd", detached=True)
        pids = [made.record.vmm.pid]
        await end(pids[0])
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)  # zombies
        other = await sandbox.create(settings, NAME, backend="file", detached=True)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        await other.kill()
        assert not Path(f"/proc/{other.record.vmm.pid}").exists()
        await made.kill()

    run(story())
    assert left_in(settings) == []


def test_a_question_ends_at_once_when_the_vmm_dies(settings: Settings, run: Run) -> None:
    async def story() -> None:
        made = await sandbox.create(settings, NAME)
        try:
            asking = asyncio.create_task(made.ask("sweep compute=100000000", 60))
            await asyncio.sleep(0)
            await end(made.record.vmm.pid)
            with pytest.raises((VmmError, PagesFailed), match=r"exited|ended"):
                await asyncio.wait_for(asking, 5)
        finally:
            await made.kill()

    run(story())


def test_a_library_sandbox_ends_with_its_process(settings: Settings, vmd: Cli) -> None:
    script = f"import asyncio; from vmd import sandbox; from vmd.settings import Settings\nasync def main():\n" \
        f"  s = await sandbox.create(Settings.read(), {NAME!r}, backend='uffd'); print(s.id, flush=True)\n" \
        f"  await asyncio.sleep(60)\nasyncio.run(main())"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        name = owner.stdout.readline().strip()
        assert sandbox.find(settings, name).state() is State.RUNNING
        owner.kill()
    eventually(lambda: not vmms_in(settings.run_dir), "its VM is gone", 1.0)
    assert [one["state"] for one in vmd.json("ls")] == ["dead"]
    assert vmd.json("kill", name) == {"killed": [name]}
    assert left_in(settings) == []


def test_a_creator_killed_before_it_recorded_the_sandbox_is_swept(settings: Settings, vmd: Cli) -> None:
    script = f"import asyncio, os\nfrom vmd import sandbox\nfrom vmd.settings import Settings\n" \
        f"sandbox.write_json = lambda *_: os.kill(os.getpid(), 9)\n" \
        f"asyncio.run(sandbox.create(Settings.read(), {NAME!r}, backend='uffd', detached=True))"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert len(vmms_in(settings.run_dir)) >= 1  # detached: it outlives its creator
    assert vmd.json("ls") == []
    assert left_in(settings) == []


def test_a_creator_killed_at_any_moment_leaves_a_sandbox_or_nothing(settings: Settings, vmd: Cli) -> None:
    for number in range(CREATE_KILLS):
        creating = vmd.start("create", NAME, "--backend", "uffd")
        try:
            creating.wait(random.Random(number).uniform(0.05, 0.6))
        except subprocess.TimeoutExpired:
            creating.kill()
            creating.wait()
        listed = vmd.json("ls")
        assert [one["state"] for one in listed] in ([], ["running"])
        assert vmd.json("kill", "--all")["killed"] == [one["id"] for one in listed]
        assert left_in(settings) == []


def test_prefixes_must_be_unique(settings: Settings, run: Run) -> None:
    async def story() -> None:
        made = [await sandbox.create(settings, NAME, backend="file") for _ in range(2)]
        try:
            with pytest.raises(UsageError, match="sandbox sb-: 2 ids begin so"):
                sandbox.find(settings, "sb-")
            with pytest.raises(NotFound):
                sandbox.find(settings, "")
        finally:
            for one in made:
                await one.kill()

    run(story())


def test_records_that_cannot_be_read_are_warned_of(settings: Settings) -> None:
    for name, text in (("sb-a", "{"), ("sb-b", "[]"), ("sb-c", '{"schema": 9}'), ("sb-d", '{"schema": 1}')):
        home = settings.state_dir / "sandboxes" / name
        home.mkdir(parents=True)
        (home / RECORD).write_text(text)
    warnings: list[str] = []
    assert sandbox.list_all(settings, warnings.append) == []
    assert len(warnings) == 4
    with pytest.raises(VmdError, match="sandbox sb-a"):
        sandbox.find(settings, "sb-a")


def test_pids_of_another_boot_are_not_believed(settings: Settings, run: Run) -> None:
    async def story() -> tuple[Sandbox, State]:
        made = await sandbox.create(settings, NAME, backend="file", detached=True)
        path = settings.state_dir / "sandboxes" / made.id / RECORD
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "boot_id": "another"}))
        state = sandbox.find(settings, made.id).state()
        await made.kill()
        return made, state

    made, state = run(story())
    assert state is State.DEAD
    assert not Path(made.record.directory).exists()


def test_a_sandbox_that_cannot_be_recorded_is_undone(
    settings: Settings, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(sandbox, "write_json", full)
    for detached in (False, True):
        with pytest.raises(OSError, match="No space left"):
            run(sandbox.create(settings, NAME, detached=detached))
        assert left_in(settings) == []
