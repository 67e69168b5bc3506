"""What the steps of the set-up share: words, commands, Debian packages, stamps.

Each step is ``python -m setup.STEP``, run by make when what it depends on is newer than its stamp. A step
works from whatever it finds, also what an interrupted run left, and makes its target (or its stamp) last.
Standard library only: the first step makes the environment that could hold anything else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMPS = VENV / ".stamps"

_APT_LISTS_SECONDS = 24 * 3600  # package lists older than this may name versions that are gone


class SetupError(Exception):
    """A step cannot go on: what is wrong, and what the reader can do about it."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(f"{what}\n  fix: {fix}")


def say(words: str) -> None:
    """One line of progress, on stderr: stdout belongs to what make was asked for."""
    print(f"set-up: {words}", file=sys.stderr, flush=True)


def run(*command: str | Path, env: dict[str, str] | None = None, fix: str = "see its output above") -> None:
    """Run ``command`` at the root, its output shown only when it fails. Raises `SetupError`."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace"))
        raise SetupError(f"`{shlex.join(words)}` failed with {done.returncode}", fix)


def apt_install(packages: list[str]) -> bool:
    """Install Debian packages; False where that is not ours to do (not root, no apt) or does not work."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return False
    say(f"installing {' '.join(packages)} by apt")
    try:
        apt_update()
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "install", "-qy", "--no-install-recommends", *packages, env=env)
    except SetupError as failed:
        say(str(failed))
        return False
    return True


def apt_update() -> None:
    """Fetch the package lists when they are missing or old. Raises `SetupError`."""
    lists = Path("/var/lib/apt/lists")
    newest = max((entry.stat().st_mtime for entry in lists.glob("*_Packages*")), default=0.0)
    if time.time() - newest > _APT_LISTS_SECONDS:
        run("apt-get", "update", "-q")


def need_tools(tools: list[str], packages: list[str], what_for: str) -> None:
    """Make sure that ``tools`` are there, by apt where possible. Raises `SetupError`."""

    def missing() -> list[str]:
        return [tool for tool in tools if not shutil.which(tool)]

    if missing() and not (apt_install(packages) and not missing()):
        fix = f"install it (Debian: apt install {' '.join(packages)})"
        raise SetupError(f"{' and '.join(missing())} not found, needed for {what_for}", fix)


def put(source: Path, target: Path, mode: int) -> None:
    """Copy ``source`` to ``target`` so that nobody ever sees half of it, nor a busy file written to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, partial)
    partial.chmod(mode)
    partial.replace(target)


def step(name: str, work: Callable[[], bool]) -> None:
    """Run one step as the only one in this tree; stamp it when ``work`` says that it is complete."""
    started = time.monotonic()
    try:
        with _alone():
            if work():
                STAMPS.mkdir(parents=True, exist_ok=True)
                (STAMPS / name).touch()
                say(f"{name} done in {time.monotonic() - started:.0f} s")
    except SetupError as error:
        say(f"{name} failed: {error}")
        sys.exit(1)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Two makes at once take turns: both would write the same environment."""
    lock = ROOT / "build" / "setup.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
