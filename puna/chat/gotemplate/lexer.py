"""A Go template's source, cut into text and the tokens of its actions. The rules are those of text/template."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from puna.errors import TemplateError

MAX_TOKENS = 1000
_SPACE = " \t\r\n"
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
    | (?P<text>"(?:[^"\\\n]|\\.)*")
    | (?P<raw>`[^`]*`)
    | (?P<char>'(?:[^'\\\n]|\\.)')
    | (?P<number>[+-]?\.?[0-9][0-9A-Za-z_.]*(?:(?<=[eEpP])[+-][0-9]+)?)
    | (?P<variable>\$\w*)
    | (?P<field>\.\w+)
    | (?P<dot>\.)
    | (?P<word>[^\W\d]\w*)
    | (?P<mark>:=|=|\||\(|\)|,)""",
    re.VERBOSE,
)
_GO_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|U([0-9a-fA-F]{8})|u([0-9a-fA-F]{4})|([0-7]{3})|(.))", re.DOTALL)
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"', "'": "'"}


@dataclass(frozen=True)
class Token:
    """``kind``: ``literal``, ``variable``, ``field``, ``dot``, ``word`` or ``mark``. ``glued``: no space before it."""

    kind: str
    value: Any
    line: int
    glued: bool


@dataclass(frozen=True)
class Piece:
    """Plain text, or the tokens of one action."""

    line: int
    text: str | None = None
    tokens: tuple[Token, ...] = ()


def syntax_error(line: int, problem: str) -> TemplateError:
    return TemplateError(f"the chat template (Go syntax) does not compile: line {line}: {problem}")


def pieces(source: str) -> Iterator[Piece]:
    """Text and actions in turn, trimmed as ``{{-`` and ``-}}`` ask. Raises TemplateError naming the line."""
    ends = [match.start() for match in re.finditer("\n", source)]

    def line_of(at: int) -> int:
        return bisect_left(ends, at) + 1

    at, trim = 0, False
    while True:
        start = source.find("{{", at)
        text = source[at:] if start < 0 else source[at:start]
        if trim:
            text = text.lstrip(_SPACE)
        inner = start + 2
        if start >= 0 and source[inner : inner + 1] == "-" and source[inner + 1 : inner + 2] in tuple(_SPACE):
            text = text.rstrip(_SPACE)
            inner += 2
        if text:
            yield Piece(line_of(at), text=text)
        if start < 0:
            return
        if source.startswith("/*", inner):
            at, trim = _after_comment(source, inner, line_of)
        else:
            tokens, at, trim = _action(source, inner, line_of)
            yield Piece(line_of(start), tokens=tokens)


def _after_comment(source: str, start: int, line_of: Callable[[int], int]) -> tuple[int, bool]:
    end = source.find("*/", start)
    if end < 0:
        raise syntax_error(line_of(start), "a comment is not closed with */")
    match = re.compile(r"(?:([ \t\r\n]-)|)\}\}").match(source, end + 2)
    if match is None:
        raise syntax_error(line_of(end), "a comment must end its action: */}}")
    return match.end(), match[1] is not None


def _action(source: str, start: int, line_of: Callable[[int], int]) -> tuple[tuple[Token, ...], int, bool]:
    """The tokens from ``start`` on, where the text after them begins, and whether that is trimmed."""
    tokens: list[Token] = []
    at, line = start, line_of(start)
    glued = False
    while True:
        if source.startswith("}}", at):
            return tuple(tokens), at + 2, False
        if not glued and source.startswith("-}}", at) and at > start:
            return tuple(tokens), at + 3, True
        match = _TOKEN.match(source, at)
        if match is None:
            if at >= len(source):
                raise syntax_error(line, "an action is not closed with }}")
            raise syntax_error(line_of(at), f"unexpected {source[at : at + 10].splitlines()[0]!r} in an action")
        kind, value = str(match.lastgroup), match[0]
        here = line
        line += value.count("\n")
        at = match.end()
        if kind == "space":
            glued = False
            continue
        tokens.append(_token(kind, value, here, glued))
        if len(tokens) > MAX_TOKENS:
            raise syntax_error(line, f"an action has more than {MAX_TOKENS} parts")
        glued = True


def _token(kind: str, value: str, line: int, glued: bool) -> Token:
    if kind == "text":
        return Token("literal", _unescape(value[1:-1], line), line, glued)
    if kind == "raw":
        return Token("literal", value[1:-1].replace("\r", ""), line, glued)
    if kind == "char":
        return Token("literal", ord(_unescape(value[1:-1], line)), line, glued)
    if kind == "number":
        return Token("literal", _number(value, line), line, glued)
    if kind == "word" and value in ("true", "false", "nil"):
        return Token("literal", json.loads(value.replace("nil", "null")), line, glued)
    return Token(kind, value[1:] if kind == "field" else value, line, glued)


def _number(text: str, line: int) -> int | float:
    for read in (lambda: int(text, 0), lambda: int(text), lambda: float(text)):
        try:
            return read()
        except ValueError:
            continue
    raise syntax_error(line, f"{text[:40]!r} is not a number")


def _unescape(text: str, line: int) -> str:
    def replaced(match: re.Match[str]) -> str:
        code = match[1] or match[2] or match[3]
        if code or match[4]:
            number = int(code, 16) if code else int(match[4], 8)
            if number > 0x10FFFF or 0xD800 <= number < 0xE000:
                raise syntax_error(line, f"{match[0]} is not a character")
            return chr(number)
        if match[5] not in _SIMPLE:
            raise syntax_error(line, f"unknown escape {match[0]!r} in a text")
        return _SIMPLE[match[5]]

    return _GO_ESCAPE.sub(replaced, text)
