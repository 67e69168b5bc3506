r"""The scanner of the handshake's body: any bytes, in any pieces; the pieces are what is between ``\xfe`` bytes."""

from __future__ import annotations

import json
from typing import Any

from vmd.pages.jsonscan import ArrayScanner, _Want

from . import _line

MARK = b"\xfe"
_SCALAR_CHARS_MAX = 999  # one more may be needed to end a number
_MISSING = {
    _Want.ARRAY: "[]",
    _Want.ELEMENT: "{}",
    _Want.KEY: '"":0',
    _Want.COLON: ":0",
    _Want.VALUE: "0",
}


def run(data: bytes) -> None:
    """Say the same however the bytes are cut, agree with `json`, and go on only where there is a way on."""
    pieces = data.split(MARK)
    whole = b"".join(pieces)
    verdict = _verdict([whole])
    assert _verdict(pieces) == verdict
    assert _verdict([whole[at : at + 1] for at in range(len(whole))]) == verdict
    assert (verdict == "complete") == is_array_of_objects(whole)
    if verdict == "incomplete":
        _check_way_on(whole)


def is_array_of_objects(body: bytes) -> bool:
    """What is to be taken for one: RFC 8259, within the limits of Python and of the scanner."""

    def refuse(word: str) -> Any:
        raise ValueError(word)

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse, parse_int=_short, parse_float=_short)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _short(number: str) -> str:
    if len(number) > _SCALAR_CHARS_MAX + 1:
        raise ValueError(number)
    return number


def _verdict(pieces: list[bytes]) -> str:
    scanner = ArrayScanner()
    try:
        for piece in pieces:
            scanner.feed(piece)
    except ValueError as refused:
        _line.check(str(refused), 250)
        return "refused"
    return "complete" if scanner.complete else "incomplete"


def _check_way_on(body: bytes) -> None:
    scanner = ArrayScanner()
    scanner.feed(body)
    begun, _ = scanner._decoder.getstate()  # of a character in a string
    if not begun and len(scanner._partial) <= _SCALAR_CHARS_MAX:
        scanner.feed(_ending(scanner).encode())
        assert scanner.complete


def _ending(scanner: ArrayScanner) -> str:
    """The shortest text that completes what has come: whatever was begun, then the brackets."""
    begun, want = scanner._partial, scanner._want
    if scanner._in_string:
        # Of an escape there is a backslash, or `\u` and fewer than four digits.
        text = ("0" * (6 - len(begun)) if begun[1:] else begun) + '"'
        text += ":0" if scanner._in_key else ""
    elif begun:
        literals = [word.removeprefix(begun) for word in ("true", "false", "null") if word.startswith(begun)]
        text = literals[0] if literals else "" if begun[-1].isdigit() else "0"
    else:
        text = _MISSING.get(want, "")
    return text + "".join("]}"["[{".index(bracket)] for bracket in reversed(scanner._open))
