"""What vmd is measured against, in plain C; built when it is needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

_HERE = Path(__file__).parent
_BUILT = _HERE.parent.parent / "build" / "rivals"


def build(name: str) -> str:
    """Compile ``NAME.c`` with -O2 unless it has been; returns the program's path."""
    source, program = _HERE / f"{name}.c", _BUILT / name
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        _BUILT.mkdir(parents=True, exist_ok=True)
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, source], check=True)
    return str(program)
