"""`vmd pages serve` and what it is told: paths that clash, words that are too long, a start that is broken off."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.fakes.vmm import eventually
from tests.system.pages_serve.command import VMD, MakeMemory, PageServer, Serve
from vmd import cli

pytest_plugins = ["tests.system.pages_serve.fixtures"]


# --- outputs replace nothing but files -----------------------------------------------------------------


def _device(path: Path) -> None:
    os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3))  # as /dev/null


def _link(path: Path) -> None:
    target = path.with_name("target")
    target.write_bytes(b"old")
    path.symlink_to(target)


def _bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.lstat()
    return status.st_mode, status.st_ino, status.st_mtime_ns


@pytest.mark.parametrize("option", ["--stats", "--record"])
@pytest.mark.parametrize("make", [_device, _link, _bound, os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_replaced(
    serve_pages: Serve, make_memory: MakeMemory, run_dir: Path, option: str, make: object
) -> None:
    path = run_dir / "o"
    make(path)  # type: ignore[operator]
    before = _identity(path)
    server = serve_pages(make_memory(4), option, path, ready=False)
    server.refused(option, "not a regular file", code=2)
    assert _identity(path) == before
    assert not server.socket.exists()
    path.rmdir() if path.is_dir() else path.unlink()
    path.with_name("target").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("options", "clash"),
    [
        (["--stats", "log", "--replay", "log"], "--replay and --stats"),
        (["--stats", "log", "--record", "folder/../log"], "--record and --stats"),
        (["--stats", "new", "--record", "new"], "--record and --stats"),
        (["--stats", "hard", "--replay", "log"], "--replay and --stats"),
        (["--replay", "memory"], "--memory and --replay"),
        (["--record", "memory"], "--memory and --record"),
        (["--stats", "linked/memory"], "--memory and --stats"),
        (["--stats", "s"], "--socket and --stats"),
        (["--record", "linked/s"], "--socket and --record"),
    ],
)
def test_no_two_options_name_one_file(run_dir: Path, options: list[str], clash: str) -> None:
    for name, content in {"log": b"0\n", "memory": bytes(4096)}.items():
        (run_dir / name).write_bytes(content)
    (run_dir / "hard").hardlink_to(run_dir / "log")
    (run_dir / "folder").mkdir()
    (run_dir / "linked").symlink_to(run_dir)
    words = [VMD, "pages", "serve", "--socket", "s", "--memory", "memory", *options]
    done = subprocess.run(words, cwd=run_dir, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"vmd: error: {clash} are the same file: \S+\n", done.stderr), done.stderr
    assert ((run_dir / "log").read_bytes(), (run_dir / "memory").read_bytes()) == (b"0\n", bytes(4096))
    for path in run_dir.iterdir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


# --- one line, whatever happens ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "word"),
    [("--owner", f"{'9' * 5000}:0"), ("--owner", f"0:{'9' * 5000}"), ("--accept-timeout", "9" * 5000)],
)
def test_numbers_of_thousands_of_digits_are_a_usage_error(
    serve_pages: Serve, make_memory: MakeMemory, option: str, word: str
) -> None:
    line = serve_pages(make_memory(1), option, word, ready=False).refused(option, code=2)
    assert len(line) < 300


def test_control_characters_of_a_path_are_written_out(serve_pages: Serve, tmp_path: Path) -> None:
    line = serve_pages(tmp_path / "a\nb\x1b[2Jc\udcff", ready=False).refused("No such file")
    assert r"a\nb\x1b[2Jc" in line


def test_a_bug_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("can't start\nnew thread")

    monkeypatch.setattr(cli.vmd, "main", fail)
    assert cli.run(["pages", "serve"]) == 1
    assert capfd.readouterr() == ("", 'vmd: error: RuntimeError("can\'t start\\nnew thread")\n')
    with pytest.raises(RuntimeError):  # of any other command the whole story is wanted
        cli.run(["ls"])


def test_no_thread_to_be_had_is_one_line(make_memory: MakeMemory) -> None:
    memory = make_memory(1)
    script = "\n".join(
        [
            "import threading, sys, vmd.cli, vmd.cli.pages",
            'def no(self): raise RuntimeError("can\'t start new thread")',
            "threading.Thread.start = no",
            "sys.exit(vmd.cli.run(sys.argv[1:]))",
        ]
    )
    path = Path(os.environ["VMD_RUN_DIR"], "s")
    words = [
        str(Path(VMD).with_name("python")),
        "-c",
        script,
        "pages",
        "serve",
        "--socket",
        str(path),
        "--memory",
        str(memory),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "vmd: error: page server: can't start new thread\n"
    assert not path.exists()


def test_stderr_that_is_closed_does_not_turn_errors_to_stdout() -> None:
    done = subprocess.run(["sh", "-c", f"{VMD} pages serve --no-such 2>&-"], capture_output=True, timeout=20)
    assert (done.returncode, done.stdout) == (2, b"")


# --- a start that is broken off ------------------------------------------------------------------------


def _catches_sigint(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(status.split("SigCgt:")[1].split()[0], 16) & 1 << (signal.SIGINT - 1))


@pytest.mark.parametrize("delay_ms", range(0, 150, 10))
def test_sigint_while_it_starts_is_no_traceback(serve_pages: Serve, make_memory: MakeMemory, delay_ms: int) -> None:
    server = serve_pages(make_memory(1), ready=False)
    _wait_for_our_first_line(server)
    time.sleep(delay_ms / 1000)
    server.send(signal.SIGINT)
    assert server.has_ended(20)
    assert server.process.wait() in (0, -signal.SIGINT)
    assert server.stderr() == ""


def _wait_for_our_first_line(server: PageServer) -> None:
    """The interpreter catches SIGINT when it starts; the first line of ours ends that."""
    eventually(lambda: server.has_ended() or _catches_sigint(server.pid), "the interpreter starts")
    while _catches_sigint(server.pid) and not server.stdout():
        pass


def test_sigint_of_any_other_command_is_one_line() -> None:
    script = "import signal; signal.raise_signal(signal.SIGINT)"
    done = subprocess.run(
        [str(Path(VMD).with_name("python")), "-c", f"import vmd.cli as c\ndef f(*_, **__):\n {script}\nc.vmd.main = f\n"
         "import sys; sys.argv[1:] = ['ls']; c.main()"],
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "vmd: error: interrupted\n")


def test_it_takes_the_descriptors_that_it_may_have(make_memory: MakeMemory, serve_pages: Serve) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        server = serve_pages(make_memory(1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (min(hard, 1 << 16), hard)
