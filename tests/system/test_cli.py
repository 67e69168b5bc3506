"""The command line, end to end: what it prints where, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import Any

import pytest

from tests.fakes.vmm import eventually
from tests.system.conftest import NAME, START, VMD, Cli, left_in, numbers, vmms_in
from vmd.settings import Settings
from vmd.template import Template

CREATED = {"id", "template", "backend", "backend_reason", "vmm_pid", "timings_ms"}
TIMINGS = ["spawn", "handshake", "load", "resume", "ready", "total"]


def test_from_a_build_to_a_kill(vmd: Cli, settings: Settings) -> None:
    built = vmd.json("template", "build", "first", "--guest", "micro", "--mem", "32", "--start", "sweep pages=64")
    assert built["name"] == "first"
    assert len(built["snapshot_id"]) == 32
    assert built["recorded_pages"] >= 64
    assert built["recording_ended"] == "settled"
    assert [one["name"] for one in vmd.json("template", "ls")] == ["first"]
    made = vmd.json("create", "first")
    assert made.keys() >= CREATED
    assert list(made["timings_ms"]) == TIMINGS
    assert (made["backend"], made["template"]) == ("uffd", "first")
    os.kill(made["vmm_pid"], 0)
    assert vmd("exec", made["id"], "--", "ping").stdout == "pong\n"
    assert numbers(vmd.json("exec", made["id"], "--", "check")["answer"])["wrong"] == 0
    (listed,) = vmd.json("ls")
    assert (listed["id"], listed["state"]) == (made["id"], "running")
    looked = vmd.json("inspect", made["id"])
    assert looked["pages"]["schema"] == 1
    assert looked["pages"]["vmm_pid"] == made["vmm_pid"]
    assert vmd.json("kill", made["id"]) == {"killed": [made["id"]]}
    assert vmd.json("ls") == []
    assert left_in(settings) == []
    assert vmd.json("template", "rm", "first") == {"removed": ["first"]}
    assert vmd.json("template", "ls") == []


def test_words_for_people(vmd: Cli, template: Template) -> None:
    listed = vmd("template", "ls").stdout.splitlines()
    assert listed[0].split()[:2] == ["NAME", "MEMORY"]
    assert listed[1].split()[:2] == [NAME, "64M"]
    made = vmd("create", NAME)
    name = made.stdout.strip()
    assert name.startswith("sb-")
    assert made.stderr.startswith("vmd: ready in ")
    assert vmd("ls").stdout.splitlines()[1].split()[:3] == [name, "running", NAME]
    assert "pages: {'schema': 1" in vmd("inspect", name).stdout
    assert vmd("kill", "--all").stdout == f"{name}\n"
    assert "snapshot_id: " in vmd("template", "inspect", NAME).stdout


def test_template_inspect_verifies_when_told_to(vmd: Cli, template: Template) -> None:
    assert vmd.json("template", "inspect", NAME, "--verify")["snapshot"]["snapshot_id"] == template.snapshot.snapshot_id
    content = bytearray(template.snapshot.memory.read_bytes())
    content[-1] ^= 1
    template.snapshot.memory.unlink()
    template.snapshot.memory.write_bytes(content)
    assert vmd("template", "inspect", NAME).returncode == 0
    done = vmd("template", "inspect", NAME, "--verify")
    assert done.returncode == 1
    assert "torn snapshot" in done.stderr


@pytest.mark.seed(34)
def test_both_breakers(vmd: Cli, template: Template) -> None:
    auto = vmd.json("create", NAME, VMD_UFFD_ENABLED="no")
    assert (auto["backend"], "VMD_UFFD_ENABLED=false" in auto["backend_reason"]) == ("file", True)
    assert vmd.json("inspect", auto["id"])["pages"] is None
    refused = vmd("create", NAME, "--backend", "uffd", "--json", VMD_UFFD_ENABLED="0")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "[backend_unavailable]\nvmd: hint: set VMD_UFFD_ENABLED=true" in refused.stderr
    demand = vmd.json("create", NAME, "--backend", "uffd", VMD_UFFD_PREFETCH_ENABLED="off")
    stats = vmd.json("inspect", demand["id"])["pages"]
    assert (stats["replayed"], stats["prefetched"]) == (0, 0)
    off = vmd.json("template", "build", "off", "--mem", "16", VMD_UFFD_PREFETCH_ENABLED="FALSE")
    assert (off["recording_ended"], off["recorded_pages"]) == ("off", 0)


@pytest.mark.parametrize(
    "variable", ["VMD_UFFD_ENABLED", "VMD_UFFD_PREFETCH_ENABLED", "VMD_UFFD_RECORD_MAX_SECONDS", "VMD_CORE"]
)
def test_an_unknown_value_refuses_to_start(variable: str, vmd: Cli) -> None:
    for words in (("ls",), ("create", NAME), ("template", "ls"), ("kill", "--all"), ("demo",)):
        done = vmd(*words, **{variable: "maybe"})
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"vmd: error: {variable}: expected ")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (("create", "nothing"), 3, "template nothing: there is none of that name [not_found]"),
        (("kill", "sb-nothing"), 3, "sandbox sb-nothing: there is none of that id [not_found]"),
        (("inspect", "sb-nothing"), 3, "[not_found]"),
        (("exec", "sb-nothing", "--", "ping"), 3, "[not_found]"),
        (("template", "rm", "nothing"), 3, "[not_found]"),
        (("template", "inspect", "nothing"), 3, "[not_found]"),
        (("recording", "show", "nothing"), 3, "[not_found]"),
        (("template", "build", NAME, "--mem", "16"), 4, f"template {NAME} exists [conflict]"),
        (("template", "build", "Bad", "--mem", "16"), 2, "template name 'Bad'"),
        (("template", "build", "x", "--mem", "17"), 2, "memory 17 MiB"),
        (("template", "build", "x", "--mem", "16", "--guest", "linux"), 2, "guest 'linux'"),
        (("template", "build", "x"), 2, "Missing option '--mem'"),
        (("kill",), 2, "give ids, or --all"),
        (("create", NAME, "--backend", "magic"), 2, "'magic'"),
        (("nonsense",), 2, "No such command 'nonsense'"),
        (("ls", "--nonsense"), 2, "--nonsense"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
)
def test_errors_are_one_line_and_a_code(
    words: tuple[str, ...], code: int, text: str, vmd: Cli, template: Template
) -> None:
    done = vmd(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("vmd: error: ")
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2


def test_exec_passes_on_how_it_ended(vmd: Cli, template: Template) -> None:
    name = vmd.json("create", NAME, "--backend", "file")["id"]
    done = vmd("exec", name, "--", "nonsense")
    assert done.returncode == 1
    assert done.stdout.startswith("error: ")
    done = vmd("exec", "--timeout", "0.2", name, "--", "sweep pages=4096 compute=10000000")
    assert (done.returncode, done.stdout) == (124, "")
    assert "[timed_out]" in done.stderr
    assert vmd("exec", name, "--", "x" * 300).returncode == 2
    os.kill(vmd.json("ls")[0]["vmm_pid"], signal.SIGKILL)
    eventually(lambda: vmd.json("ls")[0]["state"] == "dead")
    assert vmd("exec", name, "--", "ping").returncode == 4


def test_recordings_are_shown_and_drawn(vmd: Cli, template: Template, settings: Settings) -> None:
    shown = vmd.json("recording", "show", NAME)
    assert shown["pages"] == len(shown["offsets"]) == template.recorded_pages
    assert (shown["ended"], shown["snapshot"]) == ("settled", template.snapshot.snapshot_id)
    lines = [line for line in vmd("recording", "show", NAME).stdout.splitlines() if not line.startswith("#")]
    assert [int(line) for line in lines] == shown["offsets"]
    drawn = vmd("recording", "plot", NAME).stdout
    assert drawn.lstrip().startswith("<")
    assert "</svg>" in drawn
    assert vmd.json("recording", "plot", NAME)["svg"] == drawn.removesuffix("\n")
    file = settings.state_dir / "plot.svg"
    assert vmd.json("recording", "plot", NAME, "-o", str(file))["file"] == str(file)
    assert file.read_text() in drawn
    template.access_log.unlink()
    assert vmd("recording", "show", NAME).returncode == 3


@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGTERM])
def test_a_create_that_is_told_to_end_leaves_nothing(
    word: signal.Signals, vmd: Cli, template: Template, settings: Settings
) -> None:
    # The VMM is stopped as soon as it is there, so the load cannot end before the signal comes.
    creating = vmd.start("create", NAME, "--backend", "file")
    pid = eventually(lambda: next(iter(vmms_in(settings.run_dir)), None), "its VM is there")
    os.kill(pid, signal.SIGSTOP)
    creating.send_signal(word)
    assert creating.wait(10) in (130 if word == signal.SIGINT else 143, 0)  # 0: it was faster than we
    vmd("kill", "--all")
    assert left_in(settings) == []


def test_help_names_every_command(vmd: Cli) -> None:
    text = vmd("--help").stdout
    for name in ("doctor", "demo", "template", "recording", "create", "ls", "inspect", "exec", "kill", "pages"):
        assert f"\n  {name} " in text
        assert vmd(name, "--help").returncode == 0
    assert vmd("--version").stdout.startswith("vmd, version ")


def test_a_reader_that_leaves_is_no_traceback(template: Template) -> None:
    with subprocess.Popen(
        [VMD, "recording", "show", NAME], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as showing:
        assert showing.stdout is not None
        assert showing.stderr is not None
        showing.stdout.close()
        assert "Traceback" not in showing.stderr.read()


@pytest.mark.timeout(120)
def test_the_demo_measures_and_checks(vmd: Cli, settings: Settings) -> None:
    report: dict[str, Any] = vmd.json("demo", "--runs", "2", "--mem", "64")
    assert report["runs"] == 2
    for way in ("file", "on_demand", "replay"):
        row = report[way]
        assert row["wrong_words"] == 0
        assert 0 < row["median_ms"] <= row["p99_ms"]
        assert row["ratio_to_file"] == pytest.approx(row["median_ms"] / report["file"]["median_ms"], abs=1e-3)
    snapshot = [one["snapshot_id"] for one in vmd.json("template", "ls")]
    done = vmd("demo", "--runs", "1", "--mem", "64")
    assert done.returncode == 0
    assert "ratio to File" in done.stdout
    assert "checked answer" in done.stdout or "not faster" in done.stdout
    assert [one["snapshot_id"] for one in vmd.json("template", "ls")] == snapshot  # kept
    vmd.json("demo", "--runs", "1", "--mem", "32")
    assert [one["mem_mib"] for one in vmd.json("template", "ls")] == [32]  # another shape: built anew
    assert left_in(settings) == []


def test_the_demo_says_reference_slow(vmd: Cli) -> None:
    done = vmd("demo", "--runs", "1", "--mem", "32", VMD_CORE="reference")
    assert done.returncode == 0
    assert "reference (slow)" in done.stdout


def test_the_demo_refuses_an_open_breaker(vmd: Cli) -> None:
    done = vmd("demo", VMD_UFFD_PREFETCH_ENABLED="false")
    assert done.returncode == 1
    assert "[backend_unavailable]" in done.stderr


def test_json_is_one_value(vmd: Cli, template: Template) -> None:
    for words in (("ls",), ("template", "ls"), ("template", "inspect", NAME), ("recording", "show", NAME)):
        json.loads(vmd(*words, "--json").stdout)


def test_the_start_command_that_was_recorded_is_kept(template: Template) -> None:
    assert template.shape.start == START
