"""GBNF, llama.cpp's grammar format, in llguidance's variant of Lark's syntax.

Source: llama.cpp's grammars/README.md. A rule that leads to no recursion becomes a terminal, which is a regular
expression: masks of single characters under recursive rules take a hundred times as long. Between terminals, the
longest match counts: after ``"a" | "ab"``, a recursive rule can't go on with ``"bc"`` in "abc". So a recursive grammar
may allow less than llama.cpp does, never more.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from puna.errors import RequestError

MAX_DEPTH = 100  # of groups

_RULE = re.compile(r"(?m)^[ \t]*[A-Za-z0-9_-]+[ \t]*::=")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"(?:[ \t]|#[^\r\n]*)+")
_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)+")
_REPEAT = re.compile(r"[*+?]|\{[ \t]*(\d+)[ \t]*(?:(,)[ \t]*(\d*)[ \t]*)?\}")
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_PLAIN_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-", "^": "^"}


class _Part(NamedTuple):
    """A piece of a rule: ``{}`` stands for each name of a rule in it."""

    text: str
    names: tuple[str, ...] = ()


def is_gbnf(grammar: str) -> bool:
    """Whether a grammar is GBNF: only there rules are written with ``::=``."""
    return _RULE.search(grammar) is not None


def lark_from_gbnf(grammar: str) -> str:
    """Translate a grammar. Raises RequestError with the line of what cannot be read."""
    rules = _Reader(grammar).rules()
    if "root" not in rules:
        raise RequestError("the GBNF grammar has no rule named root, where it would start")
    for name, part in rules.items():
        for used in part.names:
            if used not in rules:
                raise RequestError(f"the GBNF grammar's rule {name} uses {used}, which is not defined")
    regular = _regular(rules)
    new_names = {name: f"{'R' if name in regular else 'r'}{i}" for i, name in enumerate(rules)}
    lines = [f"start: {new_names['root']}"]
    lines += [f"{new_names[name]}: {_rename(part, new_names)}" for name, part in rules.items()]
    return "\n".join(lines)


def _regular(rules: dict[str, _Part]) -> set[str]:
    """The rules that lead to no recursion: those that use none, then those that use only these, and so on."""
    found: set[str] = set()
    while more := {name for name, part in rules.items() if name not in found and found.issuperset(part.names)}:
        found |= more
    return found


def _rename(part: _Part, new_names: dict[str, str]) -> str:
    names = iter(part.names)
    return re.sub("\0", lambda _: new_names[next(names)], part.text)


class _Reader:
    """Recursive descent over the text; in what it gives, NUL stands for the name of a rule."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def rules(self) -> dict[str, _Part]:
        found: dict[str, _Part] = {}
        self._skip(_LINES)
        while self._at < len(self._text):
            name = self._expect(_NAME, "the name of a rule")
            self._skip(_BLANK)
            self._expect(re.compile("::="), "::=")
            self._skip(_LINES)
            if name in found:
                raise self._error(f"the rule {name} once")
            found[name] = self._alternatives(0)
            if self._at < len(self._text) and self._text[self._at] not in "\r\n":
                raise self._error("the end of the rule")
            self._skip(_LINES)
        return found

    def _alternatives(self, depth: int) -> _Part:
        if depth > MAX_DEPTH:
            raise self._error(f"at most {MAX_DEPTH} groups inside each other")
        parts = [self._sequence(depth)]
        while self._peek() == "|":
            self._at += 1
            self._skip(_LINES)
            parts.append(self._sequence(depth))
        return _Part(" | ".join(part.text for part in parts), tuple(name for part in parts for name in part.names))

    def _sequence(self, depth: int) -> _Part:
        texts: list[str] = []
        names: tuple[str, ...] = ()
        blank = _LINES if depth else _BLANK
        while True:
            self._skip(blank)
            item = self._item(depth)
            if item is None:
                return _Part(" ".join(texts) or '""', names)
            self._skip(blank)
            repeat = ""
            while match := _REPEAT.match(self._text, self._at):
                self._at = match.end()
                item = item._replace(text=f"({item.text}{repeat})") if repeat else item
                repeat = _repetition(match)
                self._skip(blank)
            texts.append(item.text + repeat)
            names += item.names

    def _item(self, depth: int) -> _Part | None:
        """The next literal, class, rule or group; None where the sequence ends."""
        character = self._peek()
        if character == '"':
            return _Part(self._literal())
        if character == "[":
            return _Part(self._character_class())
        if character == ".":
            self._at += 1
            return _Part("/(?s:.)/")
        if character == "(":
            self._at += 1
            part = self._alternatives(depth + 1)
            self._skip(_LINES)
            self._expect(re.compile(r"\)"), ")")
            return part._replace(text=f"({part.text})")
        if character and _NAME.match(character):
            return _Part("\0", (self._expect(_NAME, "a name"),))
        if character in ("", "|", ")", "\r", "\n"):
            return None
        raise self._error("a literal, a class, a rule or a group")

    def _literal(self) -> str:
        self._at += 1
        characters = []
        while self._peek() != '"':
            characters.append(self._character())
        self._at += 1
        return json.dumps("".join(characters))

    def _character_class(self) -> str:
        self._at += 1
        negated = self._peek() == "^"
        self._at += negated
        ranges = []
        while self._peek() != "]":
            first = last = self._character()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._character()
            if first > last:
                raise self._error(f"a range that goes up, not from {first!r} to {last!r},")
            ranges.append(f"{_code(first)}-{_code(last)}")
        self._at += 1
        if not ranges:
            raise self._error("at least one character in [ ]")
        return f"/[{'^' if negated else ''}{''.join(ranges)}]/"

    def _character(self) -> str:
        character = self._peek()
        if character in ("", "\r", "\n"):
            raise self._error("a closing quote or bracket")
        if character != "\\":
            self._at += 1
            return character
        match = _ESCAPE.match(self._text, self._at)
        if match is None:
            raise self._error("a character after \\")
        digits = match[1] or match[2] or match[3]
        code = int(digits, 16) if digits else 0
        if (digits is None and match[4] not in _PLAIN_ESCAPES) or code > 0x10FFFF or 0xD800 <= code < 0xE000:
            raise self._error(f"an escape such as \\n or \\u00e9, not {match[0]},")
        self._at = match.end()
        return chr(code) if digits else _PLAIN_ESCAPES[match[4]]

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        if match:
            self._at = match.end()

    def _expect(self, pattern: re.Pattern[str], what: str) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise self._error(what)
        self._at = match.end()
        return match[0]

    def _error(self, expected: str) -> RequestError:
        line = self._text.count("\n", 0, self._at) + 1
        found = self._text[self._at : self._at + 20].split("\n")[0] or "the end of the line"
        return RequestError(f"the GBNF grammar should have {expected} in line {line}, found {found!r}")


def _repetition(match: re.Match[str]) -> str:
    if match[1] is None:
        return match[0]
    return f"{{{match[1]},{match[3]}}}" if match[2] else f"{{{match[1]}}}"


def _code(character: str) -> str:
    return f"\\x{{{ord(character):x}}}"
