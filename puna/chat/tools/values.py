"""Values as models write them, in JSON or as Python literals, read piece by piece and written again as JSON.

The readers are generators that yield when they need more text, so that it may end anywhere, and raise NotAValue at the
first character that does not fit. What they read is handed to ``emit`` as soon as it is certain. Nothing is evaluated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from typing import Literal, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Emit = Callable[[str], None]
Syntax = Literal["json", "python"]

# Deeper values are no arguments of a tool, and json.loads of many programs would not read them.
MAX_DEPTH = 64
# Python's json refuses whole numbers of more than 4,300 digits.
MAX_WORD = 400

_BLANKS = re.compile(r"[ \t\r\n]*")
_PLAIN = {'"': re.compile(r'[^"\\\x00-\x1f]+'), "'": re.compile(r"""[^"'\\\x00-\x1f]+""")}
_WORD = re.compile(r"[\w.+-]+")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PYTHON_NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]+)*\.?([0-9]+(_[0-9]+)*)?|\.[0-9]+(_[0-9]+)*)([eE][+-]?[0-9]+)?")
_PYTHON_HEX = re.compile(r"0[xX][0-9a-fA-F]+")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_CODES = {"x": 2, "u": 4, "U": 8}
_PYTHON_ESCAPES = {"a": "\a", "v": "\v", "\n": ""}


class NotAValue(Exception):
    """The text does not go on as it should. Never leaves this package."""


class Source:
    """Text that arrives in pieces. ``at`` is how far it has been read; it has ``ended`` when no more will come."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False

    def peek(self) -> Steps[str]:
        """The next character; empty at the end."""
        while self.at >= len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def skip_blanks(self) -> Steps[str]:
        """Go past white space; the character after it, empty at the end."""
        while True:
            yield from self.peek()
            match = _BLANKS.match(self.text, self.at)
            assert match is not None  # it matches nothing at all, too
            self.at = match.end()
            if self.at < len(self.text) or self.ended:
                return (yield from self.peek())

    def take(self, expected: str) -> Steps[None]:
        """Go past this text, character by character."""
        for char in expected:
            if (yield from self.peek()) != char:
                raise NotAValue
            self.at += 1


def read_value(source: Source, emit: Emit, syntax: Syntax, depth: int = 0) -> Steps[None]:
    """One value of any kind."""
    if depth > MAX_DEPTH:
        raise NotAValue
    first = yield from source.skip_blanks()
    if first == "{":
        yield from read_object(source, emit, syntax, depth)
    elif first == "[" or (first == "(" and syntax == "python"):
        yield from _read_list(source, emit, syntax, depth)
    elif first == '"' or (first == "'" and syntax == "python"):
        yield from _read_string(source, emit, syntax)
    else:
        word = yield from read_word(source)
        emit(_scalar(word, syntax))


def read_object(source: Source, emit: Emit, syntax: Syntax, depth: int = 0) -> Steps[None]:
    """A JSON object or a Python dictionary with text as keys."""
    yield from source.take("{")
    emit("{")
    separator = ""
    while True:
        first = yield from source.skip_blanks()
        if first == "}" and (not separator or syntax == "python"):
            break
        if first != '"' and not (first == "'" and syntax == "python"):
            raise NotAValue
        emit(separator)
        yield from _read_string(source, emit, syntax)
        yield from source.skip_blanks()
        yield from source.take(":")
        emit(": ")
        yield from read_value(source, emit, syntax, depth + 1)
        separator = ", "
        if (yield from source.skip_blanks()) != ",":
            break
        source.at += 1
    yield from source.take("}")
    emit("}")


def read_text(source: Source) -> Steps[str]:
    """A JSON string, as the text that it means."""
    yield from source.skip_blanks()
    parts: list[str] = []
    if (yield from source.peek()) != '"':
        raise NotAValue
    yield from _read_string(source, parts.append, "json")
    text = json.loads("".join(parts))
    assert isinstance(text, str)
    return text


def read_keywords(source: Source, emit: Emit) -> Steps[None]:
    """A Python call's ``(key=value, …)``, as a JSON object. A key is handed out with the beginning of its value."""
    yield from source.take("(")
    begin = "{"
    while (yield from source.skip_blanks()) != ")":
        key = yield from read_word(source)
        if not key:
            raise NotAValue
        yield from source.skip_blanks()
        yield from source.take("=")
        yield from read_value(source, _after(f'{begin}"{quoted(key)}": ', emit), "python")
        begin = ", "
        if (yield from source.skip_blanks()) != ",":
            break
        source.at += 1
    yield from source.take(")")
    emit("{}" if begin == "{" else "}")


def read_word(source: Source) -> Steps[str]:
    """Everything that may belong to a name, a number or a word; empty if there is nothing of the kind."""
    word = ""
    while (yield from source.peek()):
        run = _WORD.match(source.text, source.at)
        if run is None:
            break
        word += run[0]
        source.at = run.end()
        if len(word) > MAX_WORD:
            raise NotAValue
    return word


def quoted(text: str) -> str:
    """The inside of a JSON string that means this text."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _read_list(source: Source, emit: Emit, syntax: Syntax, depth: int) -> Steps[None]:
    """A list, or in Python a tuple; ``(1)`` is taken for a tuple of one."""
    close = "]" if source.text[source.at] == "[" else ")"
    source.at += 1
    emit("[")
    separator = ""
    while True:
        first = yield from source.skip_blanks()
        if first == close and (not separator or syntax == "python"):
            break
        emit(separator)
        yield from read_value(source, emit, syntax, depth + 1)
        separator = ", "
        if (yield from source.skip_blanks()) != ",":
            break
        source.at += 1
    yield from source.take(close)
    emit("]")


def _read_string(source: Source, emit: Emit, syntax: Syntax) -> Steps[None]:
    """A string. Line breaks within it, which JSON forbids and models write, are taken for what they are."""
    quote = source.text[source.at]
    source.at += 1
    emit('"')
    while char := (yield from source.peek()):
        run = _PLAIN[quote].match(source.text, source.at)
        if run is not None:
            source.at = run.end()
            emit(run[0])
        elif char == "\\":
            emit((yield from _read_escape(source, syntax)))
        else:
            source.at += 1
            if char == quote:
                emit('"')
                return
            emit(quoted(char))
    raise NotAValue


def _read_escape(source: Source, syntax: Syntax) -> Steps[str]:
    yield from source.take("\\")
    kind = yield from source.peek()
    if not kind:
        raise NotAValue
    source.at += 1
    if kind in '"\\/bfnrt':
        return "\\" + kind
    if kind == "'":
        return kind
    if kind in _CODES and (kind == "u" or syntax == "python"):
        digits = yield from _read_digits(source, "0123456789abcdefABCDEF", _CODES[kind])
        if len(digits) < _CODES[kind]:
            raise NotAValue
        # A half of a surrogate pair stays as it is written: its other half may follow.
        return f"\\u{digits}" if kind == "u" else _character(int(digits, 16))
    if syntax == "json":
        raise NotAValue
    if kind in "01234567":
        return _character(int(kind + (yield from _read_digits(source, "01234567", 2)), 8))
    return quoted(_PYTHON_ESCAPES.get(kind, "\\" + kind))


def _read_digits(source: Source, allowed: str, most: int) -> Steps[str]:
    digits = ""
    while len(digits) < most and (char := (yield from source.peek())) and char in allowed:
        digits += char
        source.at += 1
    return digits


def _character(code: int) -> str:
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise NotAValue
    return quoted(chr(code))


def _after(begin: str, emit: Emit) -> Emit:
    """Like ``emit``, with ``begin`` before the first piece."""
    pending = [begin]

    def emit_after(text: str) -> None:
        emit("".join([*pending, text]))
        pending.clear()

    return emit_after


def _scalar(word: str, syntax: Syntax) -> str:
    if word in ("true", "false", "null") or _NUMBER.fullmatch(word):
        return word
    if syntax == "python":
        if word in _PYTHON_WORDS:
            return _PYTHON_WORDS[word]
        if _PYTHON_HEX.fullmatch(word):
            return str(int(word, 16))
        if _PYTHON_NUMBER.fullmatch(word):
            number = re.sub(r"^(-?)\.", r"\g<1>0.", word.replace("_", "").removeprefix("+"))
            number = re.sub(r"\.(?![0-9])", ".0", number)
            if _NUMBER.fullmatch(number):
                return number
    raise NotAValue
