"""Restores that succeed: both backends, every way to serve, all of memory checked by the guest."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.system.conftest import START, Run, evict, left_in, numbers
from vmd.backend import Request
from vmd.errors import BackendUnavailable, SnapshotError
from vmd.restore import Restored, restore
from vmd.settings import Settings
from vmd.tasks import finish
from vmd.template import Template

RequestFor = Callable[..., Request]


async def asked(request: Request, settings: Settings, *lines: str, warnings: list[str] | None = None) -> list[str]:
    """Restore, ask the guest, close; its answers, and last of all the page server's statistics as text."""
    restored = await restore(request, settings, warn=(warnings if warnings is not None else []).append)
    try:
        return [await restored.ask(line, 60) for line in lines]
    finally:
        await finish(restored.close())


async def stats_after(request: Request, settings: Settings, line: str, warnings: list[str]) -> dict[str, int]:
    """Restore, ask one line, and read the page server's statistics before the end."""
    restored = await restore(request, settings, warn=warnings.append)
    try:
        assert numbers(await restored.ask(line, 60))["wrong"] == 0
        assert restored.pages is not None
        return restored.pages.stats()
    finally:
        await finish(restored.close())


@pytest.mark.seed(2, 34)
@pytest.mark.parametrize("backend", ["file", "uffd"])
def test_every_word_of_guest_memory_is_right(
    backend: str, request_for: RequestFor, settings: Settings, run: Run
) -> None:
    pong, check, swept = run(asked(request_for(backend), settings, "ping", "check", START))
    assert pong == "pong"
    assert numbers(check)["wrong"] == 0
    assert numbers(check)["zero_pages"] > 3000  # the quarter that the guest never wrote
    assert numbers(swept)["wrong"] == 0
    assert left_in(settings) == []


@pytest.mark.parametrize("backend", ["file", "uffd"])
def test_timings_tell_what_happened(backend: str, request_for: RequestFor, settings: Settings, run: Run) -> None:
    async def story() -> Restored:
        restored = await restore(request_for(backend), settings)
        await finish(restored.close())
        return restored

    restored = run(story())
    timings = restored.timings_ms
    assert list(timings) == ["spawn", "handshake", "load", "resume", "ready", "total"]
    assert (timings["handshake"] > 0) == (backend == "uffd")
    assert timings["spawn"] > 0
    assert timings["spawn"] + timings["load"] + timings["ready"] <= timings["total"]
    assert restored.backend == backend
    assert restored.backend_reason == "asked for"


def test_replay_leaves_no_demand_faults_to_the_sweep(
    request_for: RequestFor, template: Template, settings: Settings, run: Run
) -> None:
    warnings: list[str] = []
    stats = run(stats_after(request_for(), settings, START, warnings))
    assert warnings == []
    assert stats["replay"]["pages"] == template.recorded_pages  # type: ignore[index]
    assert stats["replay"]["done"] is True  # type: ignore[index]
    assert stats["demand"] + stats["replayed"] + stats["present"] >= template.recorded_pages
    assert stats["prefetched"] == 0


@pytest.mark.seed(24)
def test_without_a_log_memory_comes_sequentially_up_to_a_bound(
    request_for: RequestFor, settings: Settings, run: Run
) -> None:
    bounded = replace(settings, prefetch_bytes_max=1 << 20)
    stats = run(stats_after(request_for(access_log=None), bounded, START, []))
    assert 0 < stats["prefetched"] <= 256
    assert stats["replayed"] == 0


@pytest.mark.seed(25)
def test_prefetch_off_means_demand_faults_only(request_for: RequestFor, settings: Settings, run: Run) -> None:
    stats = run(stats_after(request_for(), replace(settings, prefetch_enabled=False), START, []))
    assert (stats["replayed"], stats["prefetched"]) == (0, 0)
    assert stats["demand"] >= 512


@pytest.mark.seed(54)
def test_the_log_of_another_snapshot_is_refused_with_one_warning(
    request_for: RequestFor, template: Template, settings: Settings, run: Run
) -> None:
    text = template.access_log.read_text().replace(template.snapshot.snapshot_id, "0" * 32)
    template.access_log.unlink()
    template.access_log.write_text(text)
    warnings: list[str] = []
    stats = run(stats_after(request_for(), settings, START, warnings))
    assert (stats["replayed"], stats["prefetched"]) == (0, 0)
    assert len(warnings) == 1
    assert "recorded on snapshot 000" in warnings[0]
    assert "recorded on snapshot" in stats["replay"]["refused"]  # type: ignore[index]


def test_an_unreadable_log_is_one_warning(
    request_for: RequestFor, template: Template, settings: Settings, run: Run
) -> None:
    template.access_log.unlink()
    template.access_log.write_text("# vmd access-log 99\n4096\n")
    warnings: list[str] = []
    stats = run(stats_after(request_for(), settings, START, warnings))
    assert (stats["replayed"], stats["prefetched"]) == (0, 0)
    assert len(warnings) == 1


def test_a_paused_restore_waits_for_its_resume(request_for: RequestFor, settings: Settings, run: Run) -> None:
    async def story() -> str:
        restored = await restore(request_for(), settings, resume=False)
        try:
            assert restored.timings_ms["ready"] == 0
            await restored.resume()
            await restored.ready()
            return await restored.ask("ping", 10)
        finally:
            await finish(restored.close())

    assert run(story()) == "pong"


@pytest.mark.seed(34)
def test_the_breaker_turns_auto_to_file_and_refuses_uffd(request_for: RequestFor, settings: Settings, run: Run) -> None:
    opened = replace(settings, uffd_enabled=False)

    async def story() -> tuple[str, str, bool]:
        restored = await restore(request_for("auto"), opened)
        try:
            assert await restored.ask("ping", 10) == "pong"
            return restored.backend, restored.backend_reason, any(restored.directory.glob("pages*"))
        finally:
            await finish(restored.close())

    backend, reason, served = run(story())
    assert (backend, served) == ("file", False)
    assert "VMD_UFFD_ENABLED=false" in reason
    with pytest.raises(BackendUnavailable, match="VMD_UFFD_ENABLED=false") as refused:
        run(restore(request_for("uffd"), opened))
    assert refused.value.code == "backend_unavailable"
    assert refused.value.hint
    assert left_in(settings) == []


@pytest.mark.seed(21)
@pytest.mark.parametrize("file", ["vmstate", "memory"])
@pytest.mark.parametrize("size", [0, 4096, None])
def test_a_torn_snapshot_is_an_error_of_its_own(
    file: str, size: int | None, request_for: RequestFor, template: Template, settings: Settings, run: Run
) -> None:
    path = template.directory / file
    path.unlink()
    if size is not None:
        path.write_bytes(bytes(size))
    with pytest.raises(SnapshotError, match=rf"^restore sandbox s1: check snapshot t9: torn snapshot: .*{file}"):
        run(restore(request_for(), settings))
    assert left_in(settings) == []


def test_another_snapshot_format_is_refused_with_a_word(
    request_for: RequestFor, settings: Settings, template: Template, run: Run
) -> None:
    foreign = replace(request_for(), snapshot=replace(template.snapshot, format="9.0.0", firecracker="1.15.0"))
    with pytest.raises(SnapshotError, match=r"snapshot format 9\.0\.0, of Firecracker 1\.15\.0: .* loads 6\.0\.0"):
        run(restore(foreign, settings))


@pytest.mark.seed(43)
def test_restores_at_once_are_bounded_and_a_waiter_can_be_cancelled(
    request_for: RequestFor, settings: Settings, run: Run
) -> None:
    bounded = replace(settings, concurrent_restores_max=2)
    inside: list[str] = []

    async def story() -> None:
        gate, full = asyncio.Event(), asyncio.Event()

        async def one(name: str) -> None:
            async def at(step: str) -> None:
                if step == "wait for a slot":
                    inside.append(name)
                    if len(inside) == 2:
                        full.set()
                if step == "spawn the VMM":
                    await gate.wait()

            restored = await restore(request_for("file", sandbox_id=name), bounded, at=at)
            await finish(restored.close())

        tasks = {name: asyncio.create_task(one(name)) for name in ("a", "b", "c", "d")}
        await full.wait()
        waiting = [name for name in tasks if name not in inside]
        tasks[waiting[0]].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[waiting[0]]
        assert len(inside) == 2
        gate.set()
        await asyncio.gather(*(task for name, task in tasks.items() if name != waiting[0]))
        assert len(inside) == 3

    run(story())
    assert left_in(settings) == []


@pytest.mark.seed(1)
def test_a_load_reads_next_to_nothing_of_a_cold_memory(
    request_for: RequestFor, template: Template, settings: Settings, run: Run
) -> None:
    async def story() -> float:
        evict(template.snapshot.memory)
        assert resident(template.snapshot.memory) == 0
        restored = await restore(request_for(), replace(settings, prefetch_enabled=False), resume=False)
        try:
            return resident(template.snapshot.memory)
        finally:
            await finish(restored.close())

    assert run(story()) < 0.01


def resident(file: Path) -> float:
    """The share of the file that is in the page cache, by mincore(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    size = file.stat().st_size
    fd = os.open(file, os.O_RDONLY)
    pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    try:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
        assert libc.mincore(address, size, pages) == 0
        assert libc.munmap(address, size) == 0
    finally:
        os.close(fd)
    return sum(byte & 1 for byte in pages.raw) / len(pages.raw)
