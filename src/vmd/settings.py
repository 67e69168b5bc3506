"""The environment of every command, read once and checked (interfaces.md, "Environment").

An unknown word for a switch, or a number that is none, is a `UsageError`: a breaker that was
meant to be open and is not must never start silently closed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import limits
from .errors import UsageError

_WORDS = {
    "true": True, "1": True, "yes": True, "on": True,
    "false": False, "0": False, "no": False, "off": False,
}  # fmt: skip

# The native core counts in 64 bits.
_WHOLE_MAX = (1 << 64) - 1

# Of a word that is refused, in the error's text.
_SHOWN_CHARS = 40


@dataclass(frozen=True, slots=True)
class Settings:
    """One reading of the environment; every field has the meaning of its ``VMD_`` variable."""

    state_dir: Path
    run_dir: Path
    firecracker: str | None
    jailer: str | None
    uffd_enabled: bool
    prefetch_enabled: bool
    record_seconds_max: float
    concurrent_restores_max: int
    prefetch_bytes_max: int
    core: str | None

    @classmethod
    def read(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read ``env`` (default: the process environment). Raises `UsageError`."""
        env = os.environ if env is None else env
        return cls(
            state_dir=Path(os.path.realpath(env.get("VMD_STATE_DIR") or "/var/lib/vmd")),
            run_dir=_run_dir(env.get("VMD_RUN_DIR")),
            firecracker=env.get("VMD_FIRECRACKER") or None,
            jailer=env.get("VMD_JAILER") or None,
            uffd_enabled=_switch(env, "VMD_UFFD_ENABLED", True),
            prefetch_enabled=_switch(env, "VMD_UFFD_PREFETCH_ENABLED", True),
            record_seconds_max=_number(env, "VMD_UFFD_RECORD_MAX_SECONDS", limits.RECORD_SECONDS_MAX),
            concurrent_restores_max=_whole(env, "VMD_MAX_CONCURRENT_RESTORES", limits.CONCURRENT_RESTORES_MAX, least=1),
            prefetch_bytes_max=_whole(env, "VMD_PREFETCH_MAX_BYTES", limits.PREFETCH_BYTES_MAX, least=0),
            core=_choice(env, "VMD_CORE", ("native", "reference")),
        )


def default_run_dir() -> str:
    """``/run/vmd`` where ``/run`` is a tmpfs, else ``/dev/shm/vmd`` (journals want memory)."""
    return "/run/vmd" if _filesystem("/run") == "tmpfs" else "/dev/shm/vmd"


def _run_dir(word: str | None) -> Path:
    """Absolute and without links, because that is how /proc names where a VMM works."""
    if word:
        return Path(os.path.realpath(word))
    default = Path(default_run_dir())
    # Anybody can make a link in /dev/shm; nobody asked for one here, so it is left to be refused.
    return Path(os.path.realpath(default.parent), default.name)


def _filesystem(path: str) -> str:
    kind = ""
    with Path("/proc/self/mounts").open(encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[1] == path:
                kind = fields[2]
    return kind


def _switch(env: Mapping[str, str], name: str, default: bool) -> bool:
    word = env.get(name)
    if word is None:
        return default
    try:
        return _WORDS[word.lower()]
    except KeyError:
        raise UsageError(f"{name}: expected true/1/yes/on or false/0/no/off, got {word!r}") from None


def _number(env: Mapping[str, str], name: str, default: float) -> float:
    word = env.get(name, "")
    if not word:
        return default
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{name}: expected a number of seconds above 0, got {word!r}")
    return value


def _whole(env: Mapping[str, str], name: str, default: int, *, least: int) -> int:
    word = env.get(name, "")
    if not word:
        return default
    digits = word.isascii() and word.isdigit() and len(word) <= len(str(_WHOLE_MAX))
    if not (digits and least <= int(word) <= _WHOLE_MAX):
        shown = repr(word) if len(word) <= _SHOWN_CHARS else f"{word[:_SHOWN_CHARS]!r}..."
        raise UsageError(f"{name}: expected a whole number from {least} to {_WHOLE_MAX}, got {shown}")
    return int(word)


def _choice(env: Mapping[str, str], name: str, words: tuple[str, ...]) -> str | None:
    word = env.get(name, "")
    if word and word not in words:
        raise UsageError(f"{name}: expected {' or '.join(words)}, got {word!r}")
    return word or None
