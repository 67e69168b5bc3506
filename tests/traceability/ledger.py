"""Which of the promised checks hold, by what the tests that carry their numbers did.

Pure bookkeeping, told apart from pytest so that it can be tested: a check *holds* when one of its tests
passed and none failed. Anything that neither holds nor is listed as not due is a gap.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


def read_list(path: Path) -> dict[int, str]:
    """Lines ``number words``; blank lines and lines that begin with ``#`` are skipped.

    Raises `ValueError` for a line without number or words, and for a number that comes twice.
    """
    found: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            number, _, words = line.partition(" ")
            if not number.isdigit() or not words.strip() or int(number) in found:
                raise ValueError(f"{path.name}: bad line {line!r}")
            found[int(number)] = words.strip()
    return found


@dataclass(slots=True)
class Ledger:
    """Outcomes of the tests by check; `gaps` is what the run has to fail for."""

    checks: Mapping[int, str]
    not_due: Mapping[int, str]
    carriers: dict[int, set[str]] = field(default_factory=dict)
    passed: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    host_skipped: set[str] = field(default_factory=set)

    def carry(self, test: str, numbers: tuple[int, ...]) -> None:
        """Note that ``test`` holds the checks ``numbers``."""
        for number in numbers:
            self.carriers.setdefault(number, set()).add(test)

    def holding(self) -> list[int]:
        """Checks with a test that passed and none that failed."""
        return [n for n, tests in sorted(self.carriers.items()) if tests & self.passed and not tests & self.failed]

    def unprovable(self) -> list[int]:
        """Checks whose tests were all skipped since this host lacks what they need."""
        return [n for n, tests in sorted(self.carriers.items()) if tests <= self.host_skipped]

    def gaps(self) -> list[str]:
        """What is wrong, one line each; empty when every check holds or is not due."""
        settled = {*self.holding(), *self.unprovable()}
        lines = [f"check {n} is unknown, carried by {min(self.carriers[n])}" for n in self._unknown(self.carriers)]
        lines += [f"check {n} is unknown, listed as not due" for n in self._unknown(self.not_due)]
        for number, words in self.checks.items():
            if number in self.not_due:
                if number in self.carriers:
                    lines.append(f"check {number} ({words}) is listed as not due, though tests carry it")
            elif number not in self.carriers:
                lines.append(f"check {number} ({words}) is carried by no test")
            elif number not in settled:
                lines.append(f"check {number} ({words}) does not hold: no test of it passed, or one failed")
        return lines

    def summary(self) -> str:
        """How many checks hold and which are not due, in one line."""
        numbers = ", ".join(map(str, sorted(self.not_due))) or "none"
        text = f"checks: {len(self.holding())} of {len(self.checks)} hold, {len(self.not_due)} not due ({numbers})"
        if unprovable := self.unprovable():
            text += f", {len(unprovable)} not provable on this host ({', '.join(map(str, unprovable))})"
        return text

    def _unknown(self, numbers: Mapping[int, object]) -> list[int]:
        return sorted(number for number in numbers if number not in self.checks)
