"""Tool calls read from an answer while it is written."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import groupby

from puna.chat.tools.deltas import Delta, TextDelta, ToolCallArguments, ToolCallStart
from puna.chat.tools.formats import CLOSE_TAG, OPEN_TAG, PYTHON_TAG, ToolFormat
from puna.chat.tools.values import (
    Emit,
    NotAValue,
    Source,
    Steps,
    quoted,
    read_keywords,
    read_object,
    read_text,
)

CODE_TOOL = "code_interpreter"
_NAME_CHARACTER = re.compile(r"[\w.-]")
_BLANKS = re.compile(r"\s*")
_BETWEEN_CALLS = re.compile(r"\s*[;,]?\s*")


def new_call_id() -> str:
    """An id as OpenAI's API makes them."""
    return f"call_{secrets.token_hex(12)}"


class ToolCallStream:
    """The content and the calls of one answer, in the form in which they arrive.

    ``names`` are the tools that were given; a call of anything else is content. Text that turns out to be no call is
    content, unchanged. Markers, and blanks between calls, are neither. Calls are recognised wherever they begin, in
    the format's own form; a Llama may write JSON or Python, whatever it was asked for.

    A call is announced with the first piece of its arguments. Arguments that then break off stay as they are, the
    beginning of a JSON object; ``broken`` holds the indexes of such calls, which must not be run. What follows the
    break is content.
    """

    def __init__(
        self, tool_format: ToolFormat, names: Collection[str], new_id: Callable[[], str] = new_call_id
    ) -> None:
        self.broken: set[int] = set()
        self._names = frozenset(names)
        self._new_id = new_id
        self._source = Source()
        self._deltas: list[Delta] = []
        self._calls = 0
        # Text before here is handed out, as content or as a call.
        self._done = 0
        # Until content comes, blanks are held: they may belong to the form of the next call.
        self._gap: re.Pattern[str] | None = _BLANKS
        tags = tool_format.style == "tags"
        self._markers = (OPEN_TAG,) if tags else (PYTHON_TAG,)
        self._begin = re.compile(re.escape(OPEN_TAG) if tags else re.escape(PYTHON_TAG) + r"|[{\[]")
        self._attempt = self._tagged_calls if tags else self._llama_calls
        self._work = self._run()

    def push(self, text: str) -> list[Delta]:
        """What became certain with this text."""
        self._source.text += text
        return self._advance()

    def finish(self) -> list[Delta]:
        """The rest, when no more text will come."""
        self._source.ended = True
        return self._advance()

    def _advance(self) -> list[Delta]:
        next(self._work, None)
        deltas, self._deltas = self._deltas, []
        return _merged(deltas)

    # From text to attempts at calls.

    def _run(self) -> Steps[None]:
        source = self._source
        search = 0
        while True:
            match = self._begin.search(source.text, search)
            if match is None:
                search = len(source.text) if source.ended else self._possible_marker(search)
                self._content_to(search)
                if source.ended:
                    break
                yield
                continue
            start = source.at = match.start()
            self._content_to(start)
            calls = self._calls
            try:
                yield from self._attempt()
            except NotAValue:
                # Once a call is announced, its own reader has settled how far the text is handed out.
                source.at = start if self._calls == calls else self._done
            search = source.at
            if self._calls == calls:
                search = start + 1
        if self._done < len(source.text) and not self._calls:
            self._text(len(source.text))

    def _possible_marker(self, search: int) -> int:
        """Where a marker may begin at the end of the text; the text's length if none does."""
        text = self._source.text
        longest = max(map(len, self._markers)) - 1
        for start in range(max(search, len(text) - longest), len(text)):
            if any(marker.startswith(text[start:]) for marker in self._markers):
                return start
        return len(text)

    def _content_to(self, end: int) -> None:
        """Hand out text as content, unless all of it may be a gap."""
        if self._done < end and not (self._gap and self._gap.fullmatch(self._source.text, self._done, end)):
            self._text(end)

    def _text(self, end: int) -> None:
        self._deltas.append(TextDelta(self._source.text[self._done : end]))
        self._done = end
        self._gap = None

    # Calls. Each reader starts where one may begin and ends after it.

    def _llama_calls(self) -> Steps[None]:
        """After ``<|python_tag|>`` a call in any form, or else code; without it only what cannot be mistaken."""
        source, calls = self._source, self._calls
        tagged = source.text[source.at] == "<"
        if tagged:
            source.at += len(PYTHON_TAG)
        code_start = source.at
        first = yield from source.skip_blanks()
        try:
            if first == "{":
                yield from self._json_call()
            elif first == "[":
                yield from self._list()
            else:
                yield from self._python_call()
        except NotAValue:
            if not tagged or not first or calls < self._calls or CODE_TOOL not in self._names:
                raise
            source.at = code_start
            yield from self._arguments(CODE_TOOL, self._read_code)

    def _tagged_calls(self) -> Steps[None]:
        source = self._source
        source.at += len(OPEN_TAG)
        first = yield from source.skip_blanks()
        while first and first != "<":
            yield from self._list() if first == "[" else self._json_call()
            first = yield from source.skip_blanks()
            if first and first in ";,":
                source.at += 1
                first = yield from source.skip_blanks()
        yield from source.take(CLOSE_TAG)
        if self._calls:
            self._done = source.at

    def _list(self) -> Steps[None]:
        """Calls in brackets, in JSON or in Python."""
        source = self._source
        yield from source.take("[")
        while True:
            first = yield from source.skip_blanks()
            yield from self._json_call() if first == "{" else self._python_call()
            if (yield from source.skip_blanks()) != ",":
                break
            source.at += 1
        yield from source.take("]")
        self._done = source.at

    def _python_call(self) -> Steps[None]:
        """``name(key=value, …)``, or as for Llama's built-in tools ``name.call(key=value, …)``."""
        source = self._source
        known = {**{f"{name}.call": name for name in self._names}, **{name: name for name in self._names}}
        spelled = ""
        while _NAME_CHARACTER.match((yield from source.peek())):
            spelled += source.text[source.at]
            source.at += 1
            if not any(name.startswith(spelled) for name in known):
                raise NotAValue
        if spelled not in known:
            raise NotAValue
        yield from self._arguments(known[spelled], partial(read_keywords, source))

    def _json_call(self, nested: bool = False) -> Steps[None]:
        """An object with a name and arguments, in either order, or with both in ``function``, as OpenAI has it."""
        source = self._source
        name: str | None = None
        early: list[str] = []
        called = False
        yield from source.take("{")
        while True:
            key = yield from read_text(source)
            yield from source.skip_blanks()
            yield from source.take(":")
            first = yield from source.skip_blanks()
            if key in ("type", "id") and first == '"':
                yield from read_text(source)
            elif key == "function" and first == "{" and not (nested or name or early or called):
                yield from self._json_call(nested=True)
                called = True
            elif key in ("name", "function") and first == '"' and not (name or called):
                name = yield from read_text(source)
                if name not in self._names:
                    raise NotAValue
                if early:
                    yield from self._arguments(name, partial(_say, "".join(early)))
                    called = True
            elif key in ("parameters", "arguments") and not (early or called):
                if name is None:
                    yield from self._read_arguments(early.append)
                else:
                    yield from self._arguments(name, self._read_arguments)
                    called = True
            else:
                raise NotAValue
            if (yield from source.skip_blanks()) != ",":
                break
            source.at += 1
        yield from source.take("}")
        if name is not None and not called:
            yield from self._arguments(name, partial(_say, "{}"))
        elif not called:
            raise NotAValue
        self._done = source.at

    # Arguments.

    def _arguments(self, name: str, read: Callable[[Emit], Steps[None]]) -> Steps[None]:
        """Read a call's arguments. The call is announced with their first piece."""
        source = self._source
        index = self._calls

        def emit(text: str) -> None:
            if self._calls == index:
                self._calls += 1
                self._gap = _BETWEEN_CALLS
                self._deltas.append(ToolCallStart(index, self._new_id(), name))
            self._deltas.append(ToolCallArguments(index, text))
            self._done = source.at

        try:
            yield from read(emit)
        except NotAValue:
            if self._calls > index:
                self.broken.add(index)
                if source.ended and source.at == len(source.text) > self._done:
                    emit(source.text[self._done :].lstrip())
            raise

    def _read_arguments(self, emit: Emit) -> Steps[None]:
        """An object; or a string that holds the JSON text of one; or null."""
        source = self._source
        first = yield from source.skip_blanks()
        if first == "{":
            yield from read_object(source, emit, "json")
        elif first == '"':
            inner = Source()
            inner.text = yield from read_text(source)
            inner.ended = True
            parts: list[str] = []
            yield from inner.skip_blanks()
            yield from read_object(inner, parts.append, "json")
            if (yield from inner.skip_blanks()):
                raise NotAValue
            emit("".join(parts))
        else:
            yield from source.take("null")
            emit("{}")

    def _read_code(self, emit: Emit) -> Steps[None]:
        """All the rest of the answer, as the text of ``code``."""
        source = self._source
        begin = '{"code": "'
        while (yield from source.peek()):
            code = quoted(source.text[source.at :])
            source.at = len(source.text)
            emit(begin + code)
            begin = ""
        emit('"}')


def _say(text: str, emit: Emit) -> Steps[None]:
    emit(text)
    yield from ()


def _merged(deltas: Iterable[Delta]) -> list[Delta]:
    """Neighbouring pieces of one call's arguments, or of text, put together."""
    merged: list[Delta] = []
    for key, group in groupby(deltas, key=lambda delta: (type(delta), getattr(delta, "index", None))):
        pieces = list(group)
        if key[0] is ToolCallStart:
            merged += pieces
        elif key[0] is TextDelta:
            merged.append(TextDelta("".join(piece.text for piece in pieces if isinstance(piece, TextDelta))))
        else:
            fragments = [piece for piece in pieces if isinstance(piece, ToolCallArguments)]
            merged.append(ToolCallArguments(fragments[0].index, "".join(piece.fragment for piece in fragments)))
    return merged
