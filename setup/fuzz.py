"""What `make fuzz` needs beside the rest: the fuzzer of the Python targets."""

from __future__ import annotations

from .common import VENV_PYTHON, run, step
from .venv import CONSTRAINTS


def _work() -> bool:
    pip = (VENV_PYTHON, "-m", "pip", "--no-input", "--disable-pip-version-check", "install", "--quiet")
    fix = "atheris has wheels for some Pythons only; the Rust targets run without: python -m fuzz regions plan"
    run(*pip, "--constraint", CONSTRAINTS, "--group", "fuzz", fix=fix)
    return True


if __name__ == "__main__":
    step("fuzz", _work)
