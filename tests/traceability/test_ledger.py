from pathlib import Path

import pytest

from .ledger import Ledger, read_list


def ledger(*not_due: int) -> Ledger:
    return Ledger({1: "one", 2: "two"}, dict.fromkeys(not_due, "later"))


def test_a_passed_carrier_makes_a_check_hold_and_an_unlisted_one_is_a_gap() -> None:
    book = ledger()
    book.carry("t", (1,))
    book.passed.add("t")
    assert book.holding() == [1]
    assert book.gaps() == ["check 2 (two) is carried by no test"]
    assert book.summary() == "checks: 1 of 2 hold, 0 not due (none)"


@pytest.mark.parametrize("failed", [set(), {"u"}])
def test_skipped_or_failed_carriers_are_a_gap(failed: set[str]) -> None:
    book = ledger(2)
    book.carry("t", (1,))
    book.carry("u", (1,))
    book.failed |= failed
    book.passed |= {"t"} if failed else set()
    assert book.gaps() == ["check 1 (one) does not hold: no test of it passed, or one failed"]


def test_a_host_that_cannot_prove_a_check_is_told_and_is_no_gap() -> None:
    book = ledger(2)
    book.carry("t", (1,))
    book.host_skipped.add("t")
    assert book.gaps() == []
    assert book.summary() == "checks: 0 of 2 hold, 1 not due (2), 1 not provable on this host (1)"


def test_a_check_is_not_both_carried_and_not_due() -> None:
    book = ledger(1, 2)
    book.carry("t", (2,))
    assert book.gaps() == ["check 2 (two) is listed as not due, though tests carry it"]


def test_unknown_numbers_are_gaps() -> None:
    book = ledger(1, 2, 9)
    book.carry("t", (7,))
    assert book.gaps() == ["check 7 is unknown, carried by t", "check 9 is unknown, listed as not due"]


@pytest.mark.parametrize("text", ["1\n", "one\n", "1 a\n1 b\n"])
def test_a_bad_line_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match="bad line"):
        read_list(tmp_path / "list.txt")


def test_the_checks_are_numbered_without_gap() -> None:
    assert list(read_list(Path(__file__).parent / "checks.txt")) == list(range(1, 56))
