"""The scanner of the handshake's body, held against `json` itself."""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmd.pages.jsonscan import ArrayScanner

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)
arrays = st.lists(st.dictionaries(st.text(max_size=5), values, max_size=3), max_size=4)
styles = st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}])


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[low:high] for low, high in pairwise(edges)]


def scan(data: bytes, cuts: list[int]) -> ArrayScanner:
    scanner = ArrayScanner()
    for piece in pieces(data, cuts):
        scanner.feed(piece)
    return scanner


def is_array_of_objects(text: str) -> bool:
    """The model: what RFC 8259 and we accept; `json` also takes NaN and its like."""

    def refuse(word: str) -> Any:
        raise ValueError(word)

    try:
        value = json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


@given(arrays, styles, st.lists(st.integers(0, 1 << 16), max_size=6))
def test_complete_at_the_closing_bracket_and_not_before(
    value: list[Any], style: dict[str, Any], cuts: list[int]
) -> None:
    data = json.dumps(value, **style).encode("utf-8", "surrogatepass")
    try:
        data.decode()
    except UnicodeDecodeError:
        return  # a lone surrogate, which is not UTF-8
    assert not scan(data[:-1], cuts).complete
    scanner = scan(data, cuts)
    assert scanner.complete
    assert json.loads(scanner.text) == value


def complete(data: bytes, cuts: list[int]) -> bool:
    with suppress(ValueError):
        return scan(data, cuts).complete
    return False


mutations = st.tuples(st.integers(0, 1 << 16), st.sampled_from([*'[]{},:"\\ tfn0-.eE1\n', ""]), st.booleans())


@settings(max_examples=400)
@given(arrays, st.lists(mutations, min_size=1, max_size=3), st.lists(st.integers(0, 1 << 16), max_size=3))
def test_a_spoilt_text_is_complete_only_if_json_agrees(
    value: list[Any], spoils: list[tuple[int, str, bool]], cuts: list[int]
) -> None:
    text = json.dumps(value)
    for where, mark, replace in spoils:
        at = where % (len(text) + 1)
        text = text[:at] + mark + text[at + replace :]
    assert complete(text.encode(), cuts) == is_array_of_objects(text)


@settings(max_examples=400)
@given(st.text(alphabet='[]{},:"\\ 01-.eEtrufalsn', max_size=14), st.lists(st.integers(0, 1 << 16), max_size=2))
def test_any_short_text(text: str, cuts: list[int]) -> None:
    assert complete(text.encode(), cuts) == is_array_of_objects(text)


@given(st.binary(max_size=40), st.lists(st.integers(0, 1 << 16), max_size=3))
def test_any_bytes_and_any_cuts_say_the_same(data: bytes, cuts: list[int]) -> None:
    def verdict(cuts: list[int]) -> str:
        try:
            return f"complete {scan(data, cuts).complete}"
        except ValueError:
            return "refused"

    assert verdict(cuts) == verdict([]) == verdict(list(range(len(data))))


@given(arrays, st.integers(0, 1 << 16))
def test_what_is_not_refused_can_still_become_one(value: list[Any], cut: int) -> None:
    data = json.dumps(value).encode()
    scan(data[: cut % len(data)], [])  # does not raise


@pytest.mark.parametrize("digits", [1001, 5000])
def test_a_number_beyond_measure_is_refused_while_it_comes(digits: int) -> None:
    scanner = ArrayScanner()
    scanner.feed(b'[{"a":')
    with pytest.raises(ValueError, match="value"):  # noqa: PT012  (any of them may be the one)
        for _ in range(digits):
            scanner.feed(b"1")


def test_a_partial_character_waits_for_its_rest() -> None:
    scanner = ArrayScanner()
    for byte in '[{"ü":"€𝄞"}]'.encode():
        scanner.feed(bytes([byte]))
    assert scanner.complete
    assert json.loads(scanner.text) == [{"ü": "€𝄞"}]


@pytest.mark.parametrize("so_far", [b"", b"[", b"[{", b'[{"a":', b'[{"a":1', b"[]"])
def test_the_first_byte_of_a_character_outside_strings_is_enough(so_far: bytes) -> None:
    scanner = scan(so_far, [])
    with pytest.raises(ValueError, match=r"got b'\\xe2'"):
        scanner.feed(b"\xe2")
