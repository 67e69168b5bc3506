"""`vmd doctor` on this host, and on hosts that lack something."""

from __future__ import annotations

import asyncio
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from vmd import cli, guest
from vmd.cli import doctor as command
from vmd.doctor import checks, faults
from vmd.doctor.checks import Check
from vmd.errors import NotFound, VmdError
from vmd.host import filesystem, kernel
from vmd.pages import uffd
from vmd.pages.contract import Outcome
from vmd.settings import Settings

NAMES = [
    "firecracker", "kvm", "userfaultfd", "take-over", "core", "state-dir", "run-dir", "huge-pages", "jailer",
    "kernel", "so-peerpidfd", "uffdio-poison", "pagemap-scan",
]  # fmt: skip


def ask(name: str) -> Check:
    """The answer to one question, in the environment of the test."""
    return asyncio.run(checks._ask(name, checks._QUESTIONS[name], Settings.read()))


@pytest.mark.needs_kvm
@pytest.mark.needs_uffd
def test_this_host_is_well(capfd: pytest.CaptureFixture[str]) -> None:
    code = cli.run(["doctor", "--json"])
    out, err = capfd.readouterr()
    report: dict[str, Any] = json.loads(out)
    assert {"ok": report["ok"], "code": code, "stderr": err} == {"ok": True, "code": 0, "stderr": ""}, out
    assert [check["name"] for check in report["checks"]] == NAMES
    assert all(list(check) == ["name", "ok", "detail", "fix"] for check in report["checks"])
    answers = {check["name"]: check["detail"] for check in report["checks"]}
    assert "the built-in guest booted and answered in " in answers["kvm"]
    assert "a fault was served in " in answers["userfaultfd"]
    assert "was taken and served" in answers["take-over"]


def answers_of(*found: Check) -> Any:
    async def examine(_: Settings) -> list[Check]:
        return list(found)

    return examine


def test_the_words_for_people(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Check("a", True, "good"), Check("b", True, "works", "better"), Check("c", False, "bad [/x]", "repair")]
    monkeypatch.setattr(command, "examine", answers_of(*found))
    assert cli.run(["doctor"]) == 1
    assert capfd.readouterr().out.splitlines() == [
        "CHECK  RESULT   DETAIL    FIX",
        "a      ok       good",
        "b      warning  works     better",
        "c      FAILED   bad [/x]  repair",
    ]
    monkeypatch.setattr(command, "examine", answers_of(*found[:2]))
    assert cli.run(["doctor"]) == 0
    capfd.readouterr()
    command._show(found)
    shown = capfd.readouterr().out
    assert "FAILED" in shown
    assert "bad [/x]" in shown
    assert "→ repair" in shown


# --- programs --------------------------------------------------------------------------------


def impostor(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "firecracker"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("VMD_FIRECRACKER", str(path))


@pytest.mark.needs_kvm
def test_no_firecracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMD_FIRECRACKER", "/nowhere/firecracker")
    why = "VMD_FIRECRACKER: '/nowhere/firecracker' is not an executable file"
    for name in ("firecracker", "kvm"):
        assert ask(name) == Check(name, False, why, "unset VMD_FIRECRACKER or correct it")


@pytest.mark.needs_kvm
def test_another_firecracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impostor(
        tmp_path, 'test "$1" = --version && echo Firecracker v1.99.0 || { echo no luck >&2; exit 1; }', monkeypatch
    )
    answer = ask("firecracker")
    assert answer.warns
    assert answer.detail.startswith("1.99.0 at ")
    answer = ask("kvm")
    assert not answer.ok
    assert answer.detail.startswith("the built-in guest does not run: spawn doctor: ")
    assert answer.detail.endswith("its log ends: no luck")
    impostor(tmp_path, "exit 3", monkeypatch)
    assert not ask("firecracker").ok


@pytest.mark.needs_kvm
def test_the_guest_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise NotFound("built-in guest: /x/micro.elf is not there", hint="run `make develop`")

    monkeypatch.setattr(guest, "kernel", missing)
    assert ask("kvm") == Check("kvm", False, "built-in guest: /x/micro.elf is not there", "run `make develop`")


@pytest.mark.parametrize(
    ("number", "why"), [(errno.ENOENT, "No such file or directory"), (errno.EACCES, "Permission denied")]
)
def test_no_kvm(number: int, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, *rest: Any) -> int:
        if path == "/dev/kvm":
            raise OSError(number, os.strerror(number))
        return real(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    answer = ask("kvm")
    assert (answer.ok, answer.detail) == (False, f"/dev/kvm: {why}")
    assert answer.fix


def test_no_jailer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMD_JAILER", "/nowhere/jailer")
    assert ask("jailer").warns


def test_the_reference_core_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMD_CORE", "reference")
    assert ask("core") == Check("core", True, "reference (slow): no journal, no take-over", "unset VMD_CORE")


# --- userfaultfd -----------------------------------------------------------------------------


def test_userfaultfd_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise PermissionError(errno.EPERM, "userfaultfd: Operation not permitted")

    monkeypatch.setattr(uffd, "create", refuse)
    answer = ask("userfaultfd")
    assert not answer.ok
    assert answer.detail.endswith("userfaultfd: Operation not permitted")
    assert answer.fix


@pytest.mark.needs_uffd
@pytest.mark.parametrize("step", [uffd.Step(Outcome.FATAL, 0, errno.EINVAL), uffd.Step(Outcome.DONE, 4096)])
def test_a_fault_that_is_not_served_holds_nobody(step: uffd.Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_SECONDS", 0.1)
    monkeypatch.setattr(uffd, "copy", lambda *_: step)
    with pytest.raises(VmdError, match=r"UFFDIO_COPY: fatal: Invalid argument|did not hold what was put there"):
        faults.serve()


@pytest.mark.needs_uffd
def test_take_over_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        raise PermissionError(errno.EPERM, "pidfd_getfd: Operation not permitted")

    monkeypatch.setattr(faults, "pidfd_getfd", refuse)
    answer = ask("take-over")
    assert answer.warns
    assert answer.detail.endswith("pidfd_getfd: Operation not permitted")


# --- kernel and directories ------------------------------------------------------------------


def test_an_old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "release", lambda: (5, 15))
    assert not ask("kernel").ok


def test_what_the_kernel_lacks_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_PAGEMAP_SCAN", kernel._PAGEMAP_SCAN + 100)  # a request that no kernel knows
    assert not kernel.has_pagemap_scan()
    monkeypatch.setattr(kernel, "_SO_PEERPIDFD", 9999)
    assert not kernel.has_peerpidfd()
    monkeypatch.setattr(faults, "features", lambda: 0)
    answer = ask("uffdio-poison")
    assert answer.warns
    assert answer == Check(
        "uffdio-poison", True, "missing: a VM is killed for a page that cannot be read", "Linux 6.6 has it"
    )


@pytest.mark.parametrize(
    ("pool", "detail"),
    [(kernel.HugePages(0, 0), "0 of 0 pages of 2 MiB are free"), (None, "this kernel has no pages of 2 MiB")],
)
def test_no_huge_pages_is_a_warning(
    pool: kernel.HugePages | None, detail: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "huge_pages", lambda: pool)
    answer = ask("huge-pages")
    assert (answer.warns, answer.detail) == (True, detail)
    monkeypatch.setattr(kernel, "huge_pages", lambda: kernel.HugePages(8, 3))
    assert ask("huge-pages") == Check("huge-pages", True, "3 of 8 pages of 2 MiB are free")


def test_directories(run_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMD_STATE_DIR", str(state_dir / "not" / "yet"))
    assert ask("state-dir").ok
    assert not list(state_dir.iterdir())
    monkeypatch.setattr(filesystem, "keeps_holes", lambda _: False)
    assert ask("state-dir").warns
    monkeypatch.undo()
    monkeypatch.setenv("VMD_STATE_DIR", "/proc/vmd")
    assert not ask("state-dir").ok
    monkeypatch.setattr(filesystem, "kind", lambda _: "ext4")
    assert ask("run-dir").warns
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert not ask("run-dir").ok


def test_directories_that_others_can_write_to(run_dir: Path, state_dir: Path) -> None:
    (state_dir / "templates").mkdir()
    for wrong in (state_dir, state_dir / "templates", run_dir):
        wrong.chmod(0o777)
        answer = ask("run-dir" if wrong == run_dir else "state-dir")
        assert (answer.ok, answer.fix) == (False, f"chmod go-w {wrong}")
        assert answer.detail.startswith(f"{wrong} can be written by others")
        wrong.chmod(0o700)


def test_holes(state_dir: Path, run_dir: Path) -> None:
    assert filesystem.kind(Path("/proc")) == "proc"
    assert filesystem.keeps_holes(Path("/dev/shm"))
    with pytest.raises(OSError):
        filesystem.keeps_holes(Path("/proc"))


def test_a_question_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Check:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(checks, "_QUESTIONS", {"broken": broken, "kernel": checks._kernel})
    first, second = asyncio.run(checks.examine(Settings.read()))
    assert (first.ok, first.detail) == (False, "ZeroDivisionError: a bug")
    assert second.ok
