"""The built-in guest, as the set-up built it: one ELF file beside this one."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from ..errors import NotFound


def kernel() -> Path:
    """The path of ``micro.elf``. Raises `NotFound` when it was not built."""
    path = Path(str(files(__name__) / "micro.elf"))
    if not path.is_file():
        raise NotFound(f"built-in guest: {path} is not there", hint="run `make develop`")
    return path
