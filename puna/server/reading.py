"""Readers of answers: the reasoning, the calls and the text in what a model writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from puna.chat.prompt import Prompt
from puna.chat.template import Template
from puna.chat.tools import TextDelta, ThinkingStream, Tool, ToolCallStream, ToolFormat
from puna.server.pieces import AnswerReader, Delta, PlainReader
from puna.tokenizer import Tokenizer

_THINKING_MARKS = ("<think>", "</think>")


class StructuredReader:
    """Takes the reasoning off an answer, and the calls out of the rest."""

    def __init__(self, thinking: ThinkingStream | None, calls: ToolCallStream | None) -> None:
        self._thinking = thinking
        self._calls = calls

    def push(self, text: str) -> list[Delta]:
        if self._thinking is None:
            return self._read(text)
        return self._sort(self._thinking.push(text))

    def finish(self) -> list[Delta]:
        deltas: list[Delta] = [] if self._thinking is None else self._sort(self._thinking.finish())
        return deltas if self._calls is None else [*deltas, *self._calls.finish()]

    def _sort(self, parts: Sequence[Delta]) -> list[Delta]:
        deltas: list[Delta] = []
        for part in parts:
            deltas += self._read(part.text) if isinstance(part, TextDelta) else [part]
        return deltas

    def _read(self, text: str) -> list[Delta]:
        if self._calls is not None:
            return list(self._calls.push(text))
        return [TextDelta(text)] if text else []


def reader_of(
    template: Template, tokenizer: Tokenizer, prompt: Prompt, tool_format: ToolFormat | None, tools: list[Tool]
) -> tuple[Callable[[], AnswerReader], frozenset[int]]:
    """What makes the reader of one answer, and the control tokens that it must see as text.

    ``tool_format`` is None where calls are not looked for. Models whose template knows of reasoning get it taken off.
    """
    thinks = _THINKING_MARKS[0] in template.source or _THINKING_MARKS[1] in template.source
    if not thinks and tool_format is None:
        return PlainReader, frozenset()
    opened = prompt.text.rstrip().endswith(_THINKING_MARKS[0])
    names = [tool.name for tool in tools]
    special = tokenizer.special_tokens
    visible = {special[mark] for mark in _THINKING_MARKS if thinks and mark in special}
    visible |= set(tool_format.visible_special_tokens.values()) if tool_format is not None else set()

    def make() -> AnswerReader:
        thinking = ThinkingStream(opened) if thinks else None
        return StructuredReader(thinking, None if tool_format is None else ToolCallStream(tool_format, names))

    return make, frozenset(visible)
