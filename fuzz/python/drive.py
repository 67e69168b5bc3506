"""``python -m fuzz.python.drive TARGET [libFuzzer's arguments]``: one target under Atheris."""

from __future__ import annotations

import sys
from importlib import import_module

import atheris


def main() -> None:
    """Does not return: libFuzzer ends the process."""
    name = sys.argv.pop(1)
    with atheris.instrument_imports(include=["vmd"]):
        target = import_module(f"fuzz.python.{name}")
    atheris.Setup(sys.argv, target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
