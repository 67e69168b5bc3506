"""What is said of a bad input: one line that can be shown, whatever the input held."""

from __future__ import annotations


def check(line: str, chars_max: int) -> None:
    """Raise AssertionError for anything else."""
    assert line.isprintable(), ascii(line)
    assert len(line) < chars_max, line
