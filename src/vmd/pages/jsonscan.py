"""A JSON array of objects that arrives in pieces: tells when it is complete, and when it is hopeless.

`json` can only judge a whole text. A peer that has sent what can no longer become an array of
objects must be refused now, not when its time is up; one that has sent the closing bracket is
done, whether it closes its end or not. So this walks the grammar of RFC 8259 as bytes come in.
What it calls complete, `json.loads` reads (but for numbers and nesting beyond Python's limits).
"""

from __future__ import annotations

import codecs
import enum
import re


class _Want(enum.Enum):
    """What the grammar allows next, outside strings and scalars."""

    ARRAY = "an array"
    ELEMENT_OR_END = "an object or ]"
    ELEMENT = "an object"
    KEY_OR_END = "a key or }"
    KEY = "a key"
    COLON = "a colon"
    VALUE_OR_END = "a value or ]"
    VALUE = "a value"
    COMMA_OR_END = "a comma or the end of the list"
    NOTHING = "nothing but white space"


_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_SCALAR = re.compile(r"[-+.0-9A-Za-z]*")
_LITERALS = ("true", "false", "null")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_NUMBER_SO_FAR = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]*|(\.[0-9]+)?[eE][+-]?[0-9]*)?)?")
_ESCAPE_SO_FAR = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{0,4})?')
_ESCAPE_BYTES = 6
# Longer than any number that means something; keeps the checks of an unfinished one short.
_SCALAR_CHARS_MAX = 1000

_OPEN = {"{": _Want.KEY_OR_END, "[": _Want.VALUE_OR_END}
_TAKES_VALUE = (_Want.VALUE, _Want.VALUE_OR_END)
_TAKES_KEY = (_Want.KEY, _Want.KEY_OR_END)
_TAKES_END = (_Want.ELEMENT_OR_END, _Want.KEY_OR_END, _Want.VALUE_OR_END, _Want.COMMA_OR_END)


class ArrayScanner:
    """Fed with bytes, it keeps the text and says when the array's closing bracket has come."""

    def __init__(self) -> None:
        self.complete = False
        self._texts: list[str] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._want = _Want.ARRAY
        self._open: list[str] = []  # the brackets that are open, outermost first
        self._in_key = False
        self._in_string = False
        self._partial = ""  # an escape or a scalar that has begun

    @property
    def text(self) -> str:
        """All that was fed."""
        return "".join(self._texts)

    def feed(self, data: bytes) -> None:
        """Take the next bytes. Raises `ValueError`, with one line, when no array of objects can come of it."""
        try:
            text = self._decoder.decode(data)
        except UnicodeDecodeError as failure:
            raise ValueError(f"not UTF-8 ({failure.reason})") from failure
        self._texts.append(text)
        text, self._partial = self._partial + text, ""
        at = 0
        while at < len(text):
            at = self._string(text, at) if self._in_string else self._token(text, at)
        begun, _ = self._decoder.getstate()
        if begun and not self._in_string:  # whatever character it becomes, it has no place here
            raise self._unexpected(begun)

    def _string(self, text: str, at: int) -> int:
        matched = _PLAIN.match(text, at)
        at = matched.end() if matched else at
        if at == len(text):
            return at
        if text[at] == '"':
            self._in_string = False
            self._want = _Want.COLON if self._in_key else _Want.COMMA_OR_END
            return at + 1
        if text[at] == "\\":
            return self._escape(text, at)
        raise ValueError(f"control character {text[at]!r} in a string")

    def _escape(self, text: str, at: int) -> int:
        size = _ESCAPE_BYTES if text[at + 1 : at + 2] == "u" else 2
        escape = text[at : at + size]
        if not _ESCAPE_SO_FAR.fullmatch(escape):
            raise ValueError(f"bad escape {escape!r} in a string")
        if len(escape) < size:
            self._partial = escape
        return at + len(escape)

    def _token(self, text: str, at: int) -> int:
        matched = _SPACE.match(text, at)
        at = matched.end() if matched else at
        if at == len(text):
            return at
        mark = text[at]
        if self._want in _TAKES_VALUE and mark not in '{["]':
            return self._scalar(text, at)
        self._mark(mark)
        return at + 1

    def _scalar(self, text: str, at: int) -> int:
        matched = _SCALAR.match(text, at)
        end = matched.end() if matched else at
        word = text[at:end]
        whole = end < len(text)
        if len(word) > _SCALAR_CHARS_MAX or not (_is_scalar(word) if whole else _may_become_scalar(word)):
            raise self._unexpected(text[at : at + 20])
        if whole:
            self._want = _Want.COMMA_OR_END
        else:
            self._partial = word
        return end

    def _mark(self, mark: str) -> None:
        """Move by one of ``{ } [ ] , : "``, or refuse it."""
        want = self._want
        if mark == '"' and want in _TAKES_KEY + _TAKES_VALUE:
            self._in_string, self._in_key = True, want in _TAKES_KEY
        elif mark == "[" and (want is _Want.ARRAY or want in _TAKES_VALUE):
            self._want = _OPEN[mark] if self._open else _Want.ELEMENT_OR_END
            self._open.append(mark)
        elif mark == "{" and want in (_Want.ELEMENT, _Want.ELEMENT_OR_END, *_TAKES_VALUE):
            self._want = _OPEN[mark]
            self._open.append(mark)
        elif mark == ":" and want is _Want.COLON:
            self._want = _Want.VALUE
        elif mark == "," and want is _Want.COMMA_OR_END:
            self._want = self._after_comma()
        elif mark in "]}" and want in _TAKES_END and self._open[-1] == "[{"["]}".index(mark)]:
            self._close()
        else:
            raise self._unexpected(mark)

    def _after_comma(self) -> _Want:
        if len(self._open) == 1:
            return _Want.ELEMENT
        return _Want.KEY if self._open[-1] == "{" else _Want.VALUE

    def _close(self) -> None:
        self._open.pop()
        self.complete = not self._open
        self._want = _Want.NOTHING if self.complete else _Want.COMMA_OR_END

    def _unexpected(self, got: str | bytes) -> ValueError:
        return ValueError(f"expected {self._want.value}, got {got!r}")


def _is_scalar(word: str) -> bool:
    return word in _LITERALS or _NUMBER.fullmatch(word) is not None


def _may_become_scalar(word: str) -> bool:
    if not word:
        return False
    return any(literal.startswith(word) for literal in _LITERALS) or _NUMBER_SO_FAR.fullmatch(word) is not None
