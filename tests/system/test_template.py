"""Templates: built whole or not at all, listed when complete, removed while sandboxes run from them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.vmm import eventually
from tests.system.conftest import NAME, SHAPE, START, Cli, Run, left_in, numbers, vmms_in
from vmd import sandbox
from vmd import template as templates
from vmd.backend import Request
from vmd.errors import BackendUnavailable, Conflict, NotFound, SnapshotError, UsageError, VmdError
from vmd.recording import read_access_log
from vmd.restore import restore
from vmd.settings import Settings
from vmd.store import Owned
from vmd.tasks import finish
from vmd.template import MANIFEST, STAGING, Shape, Template

KILLS = int(os.environ.get("VMD_TEST_BUILD_KILLS", "12"))
"""How often a build is killed in CI; the promise was checked with 200."""

SMALL = Shape(mem_mib=16, start="sweep pages=64")


def no_progress(line: str) -> None:
    """Takes the place of a recorder of progress."""


def build(settings: Settings, name: str = "small", shape: Shape = SMALL, **keys: Any) -> Template:
    return asyncio.run(templates.build(settings, name, shape, **keys))


def test_a_build_makes_a_complete_template(settings: Settings) -> None:
    said: list[str] = []
    template = build(settings, warn=said.append, progress=no_progress)
    assert said == []
    assert sorted(path.name for path in template.directory.iterdir()) == [
        "access.log", "memory", "template.json", "vmstate",
    ]  # fmt: skip
    assert templates.load(settings, "small") == template
    assert templates.list_all(settings) == [template]
    template.snapshot.verify()
    memory = (template.directory / "memory").stat()
    assert memory.st_size == 16 << 20
    assert memory.st_blocks * 512 < memory.st_size * 0.9  # the zero quarter is a hole
    assert left_in(settings) == []


@pytest.mark.seed(27)
def test_the_recording_is_of_this_snapshot_in_first_touch_order(template: Template, settings: Settings) -> None:
    recording = read_access_log(template.access_log, template.snapshot.memory_bytes)
    assert recording.snapshot == template.snapshot.snapshot_id
    assert recording.memory is not None
    assert recording.memory.startswith(f"{template.snapshot.memory_bytes}:")
    assert recording.ended == "settled"
    assert recording.page_size == 4096
    assert len(set(recording.offsets)) == len(recording.offsets) == template.recorded_pages
    assert sum(recording.faults_per_tick) >= len(recording.offsets)
    assert list(recording.offsets) != sorted(recording.offsets)
    assert template.access_log.read_text().endswith("\n")
    assert not list(template.directory.glob(".*"))


@pytest.mark.seed(30)
def test_an_existing_log_of_the_snapshot_is_kept(template: Template, settings: Settings, run: Run) -> None:
    def look() -> tuple[int, int, bytes]:
        status = template.access_log.stat()
        return status.st_ino, status.st_mtime_ns, template.access_log.read_bytes()

    before = look()
    again = run(templates.record(settings, template))
    assert look() == before
    assert (again.recorded_pages, again.recording_ended) == (template.recorded_pages, "settled")


@pytest.mark.parametrize("breaker", ["uffd_enabled", "prefetch_enabled"])
def test_with_a_breaker_open_nothing_is_recorded(breaker: str, settings: Settings) -> None:
    template = build(replace(settings, **{breaker: False}), warn=pytest.fail)  # type: ignore[arg-type]
    assert (template.recording_ended, template.recorded_pages) == ("off", 0)
    assert not template.access_log.exists()


@pytest.mark.seed(29)
def test_a_recording_that_never_settles_ends_at_its_limit(settings: Settings) -> None:
    template = build(replace(settings, record_seconds_max=0.3), warn=pytest.fail)
    assert template.recording_ended == "timeout"
    assert template.access_log.exists()


@pytest.mark.seed(29)
def test_a_silent_recording_leaves_no_log(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "settled", lambda counts, seconds_max: "silent")
    template = build(settings, warn=pytest.fail)
    assert (template.recording_ended, template.recorded_pages) == ("silent", 0)
    assert not template.access_log.exists()


@pytest.mark.seed(32)
@pytest.mark.parametrize("start", ["no-such-command", "sweep pages=1000000"])
def test_a_start_that_fails_is_a_warning(start: str, settings: Settings) -> None:
    warnings: list[str] = []
    template = build(settings, shape=replace(SMALL, start=start), warn=warnings.append)
    assert template.recording_ended == "failed"
    (warning,) = warnings
    assert "the guest answered 'error: " in warning
    assert not template.access_log.exists()
    assert left_in(settings) == []


@pytest.mark.seed(32, 31)
def test_a_recording_whose_restore_fails_is_a_warning(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings.run_dir / "build-record-small").mkdir()  # in the way, and not empty
    (settings.run_dir / "build-record-small" / "somebody.s").touch()
    warnings: list[str] = []
    template = build(settings, warn=warnings.append)
    assert template.recording_ended == "failed"
    assert "restore sandbox build-record-small: make the run directory" in warnings[0]
    (settings.run_dir / "build-record-small" / "somebody.s").unlink()
    (settings.run_dir / "build-record-small").rmdir()
    assert left_in(settings) == []


def test_a_cancelled_build_leaves_nothing(settings: Settings, run: Run) -> None:
    async def story(until: str) -> None:
        reached = asyncio.Event()
        task = asyncio.create_task(
            templates.build(
                settings, "small", SMALL, progress=lambda line: reached.set() if line.startswith(until) else None
            )
        )
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    for until in ("booting", "freezing", "recording"):
        run(story(until))
        assert left_in(settings) == []
        assert list((settings.state_dir / "templates").iterdir()) == []


def test_names_are_checked(settings: Settings) -> None:
    for name in ("", "Upper", "a/b", "../x", ".hidden", "build-x", "a" * 64, "a b", "ä"):
        with pytest.raises(UsageError, match="template name"):
            build(settings, name)
        with pytest.raises(UsageError, match="template name"):
            templates.load(settings, name)
    templates.check_name("a" * 63)
    templates.check_name("0.9_x-y")


def test_a_name_that_is_taken_is_a_conflict(template: Template, settings: Settings) -> None:
    with pytest.raises(Conflict, match=f"template {NAME} exists"):
        build(settings, NAME)
    assert templates.load(settings, NAME) == template


def test_a_name_that_is_being_built_is_a_conflict(settings: Settings, run: Run) -> None:
    async def story() -> None:
        booting = asyncio.Event()
        first = asyncio.create_task(templates.build(settings, "small", SMALL, progress=lambda line: booting.set()))
        await booting.wait()
        with pytest.raises(Conflict, match="template small is being built"):
            await templates.build(settings, "small", SMALL)
        assert (await first).name == "small"

    run(story())


def test_remove_takes_all_of_it(template: Template, settings: Settings) -> None:
    templates.remove(settings, NAME)
    assert not template.directory.exists()
    assert templates.list_all(settings) == []
    for again in (templates.remove, templates.load):
        with pytest.raises(NotFound, match=f"template {NAME}: there is none"):
            again(settings, NAME)


@pytest.mark.parametrize("backend", ["file", "uffd"])
def test_a_template_can_be_removed_while_sandboxes_run_from_it(
    backend: str, template: Template, settings: Settings, run: Run
) -> None:
    async def story() -> tuple[str, str]:
        made = await sandbox.create(settings, NAME, backend=backend)  # type: ignore[arg-type]
        try:
            templates.remove(settings, NAME)
            return await made.ask("ping", 10), await made.ask("check", 60)
        finally:
            await made.kill()

    pong, check = run(story())
    assert pong == "pong"
    assert numbers(check)["wrong"] == 0


def test_a_removal_that_was_cut_short_is_swept_and_never_listed(
    template: Template, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Owned, "discard", Owned._release)
        templates.remove(settings, NAME)
    assert templates.list_all(settings) == []
    assert not template.directory.exists()
    (left,) = (settings.state_dir / "templates").iterdir()
    assert (left / "memory").exists()
    assert templates.sweep(settings) == [left]
    assert not left.exists()


def test_directories_of_somebody_else_are_left_alone(vmd: Cli, settings: Settings) -> None:
    """VMD_STATE_DIR may be a project that keeps e-mail templates."""
    registry = settings.state_dir / "templates"
    for name in ("emails", ".git", ".build-cache", ".build-x-abcdefgh"):
        (registry / name).mkdir(parents=True)
        (registry / name / "welcome.txt").touch()
    before = sorted(registry.rglob("*"))
    assert vmd.json("ls") == vmd.json("template", "ls") == []
    assert templates.sweep(settings) == []
    with pytest.raises(Conflict, match=r"templates/emails is in the way, and is no template"):
        build(settings, "emails")
    with pytest.raises(NotFound):
        templates.remove(settings, "emails")
    assert sorted(registry.rglob("*")) == before


def test_a_link_among_the_templates_is_not_followed_by_a_removal(template: Template, settings: Settings) -> None:
    link = template.directory.with_name("linked")
    link.symlink_to(template.directory)
    with pytest.raises(Conflict, match="is a symbolic link"):
        templates.remove(settings, "linked")
    assert templates.load(settings, NAME) == template


def test_a_manifest_that_cannot_be_read_is_warned_of(template: Template, settings: Settings) -> None:
    manifest = template.directory / MANIFEST
    manifest.unlink()
    manifest.write_text("{")
    warnings: list[str] = []
    assert templates.list_all(settings, warnings.append) == []
    assert len(warnings) == 1
    with pytest.raises(SnapshotError, match=f"template {NAME}: .*not JSON"):
        templates.load(settings, NAME)
    templates.remove(settings, NAME)


def test_a_manifest_of_another_version_is_warned_of(template: Template, settings: Settings) -> None:
    manifest = template.directory / MANIFEST
    content = json.loads(manifest.read_text())
    for key, value in (("schema", 99), ("snapshot", {**content["snapshot"], "schema": 99})):
        manifest.unlink()
        manifest.write_text(json.dumps({**content, key: value}))
        warnings: list[str] = []
        assert templates.list_all(settings, warnings.append) == []
        assert len(warnings) == 1
        assert "schema 99, this vmd reads 1" in warnings[0]
        with pytest.raises(VmdError, match="schema 99"):
            templates.load(settings, NAME)


# --- 2 MiB pages -----------------------------------------------------------------------------


@pytest.mark.seed(55)
def test_2_mib_pages(huge_pages: None, settings: Settings, run: Run) -> None:
    template = build(settings, "huge", replace(SHAPE, mem_mib=64, page_size=2 << 20), warn=pytest.fail)
    assert template.recording_ended == "settled"
    recording = read_access_log(template.access_log, template.snapshot.memory_bytes)
    assert recording.page_size == 2 << 20
    assert all(offset % (2 << 20) == 0 for offset in recording.offsets)

    def request(backend: str, log: Path | None) -> Request:
        return Request("s1", "huge", template.snapshot, backend, log)  # type: ignore[arg-type]

    async def story(log: Path | None) -> dict[str, Any]:
        restored = await restore(request("auto", log), settings, warn=pytest.fail)
        try:
            assert numbers(await restored.ask(START, 60))["wrong"] == 0
            assert numbers(await restored.ask("check", 60))["wrong"] == 0
            assert restored.pages is not None
            return restored.pages.stats()
        finally:
            await finish(restored.close())

    assert run(story(template.access_log))["replayed"] > 0
    small = template.directory / "small.log"
    small.write_text("".join(f"{offset + 4096}\n{offset + 8192}\n" for offset in recording.offsets))
    stats = run(story(small))
    assert stats["replay"]["pages"] == len(recording.offsets)
    for backend, opened in (("file", settings), ("auto", replace(settings, uffd_enabled=False))):
        with pytest.raises(BackendUnavailable, match="2 MiB pages"):
            run(restore(request(backend, None), opened))


def test_2_mib_pages_that_are_not_there_are_named(settings: Settings) -> None:
    with pytest.raises(Conflict, match=r"2 MiB pages: 500000 are needed, \d+ are free") as refused:
        build(settings, "huge", Shape(1_000_000, 2 << 20))
    assert "/proc/sys/vm/nr_hugepages" in (refused.value.hint or "")


# --- SIGKILL ---------------------------------------------------------------------------------


@pytest.mark.seed(31)
@pytest.mark.timeout(60 + 5 * KILLS)
def test_a_build_killed_at_any_moment_leaves_nothing_for_long(vmd: Cli, settings: Settings) -> None:
    """No VM after 1 s, no incomplete template in any list, and the next command sweeps the rest."""
    began = time.monotonic()
    vmd.json("template", "build", "timed", "--mem", "16", "--start", "sweep pages=64")
    takes = time.monotonic() - began
    for number in range(KILLS):
        moment = random.Random(number).uniform(0, takes * 1.1)
        kill_a_build_after(vmd, settings, f"killed{number}", moment)
    assert left_in(settings) == []
    assert not list((settings.state_dir / "templates").glob(f"{STAGING}*"))


def kill_a_build_after(vmd: Cli, settings: Settings, name: str, seconds: float) -> None:
    building = vmd.start("template", "build", name, "--mem", "16", "--start", "sweep pages=64")
    try:
        building.wait(seconds)
    except subprocess.TimeoutExpired:
        building.send_signal(signal.SIGKILL)
        building.wait()
    eventually(lambda: not vmms_in(settings.run_dir), f"no VM is left of a build killed after {seconds} s", 1.0)
    listed = [found.name for found in templates.list_all(settings, pytest.fail)]
    complete = (settings.state_dir / "templates" / name / MANIFEST).exists()
    assert (name in listed) == complete
    names = [found["name"] for found in vmd.json("template", "ls")]
    assert names == listed
    assert left_in(settings) == [], f"after {seconds} s"
    assert not list((settings.state_dir / "templates").glob(f"{STAGING}*")), f"after {seconds} s"
    if complete:
        templates.load(settings, name).snapshot.verify()


@pytest.mark.parametrize("word", [signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_told_to_end_sweeps_itself(word: signal.Signals, vmd: Cli, settings: Settings) -> None:
    building = vmd.start("template", "build", "told", "--mem", "64")
    eventually(lambda: vmms_in(settings.run_dir), "its VM is there")
    building.send_signal(word)
    assert building.wait(10) == (130 if word == signal.SIGINT else 143)
    assert left_in(settings) == []
    assert list((settings.state_dir / "templates").iterdir()) == []
