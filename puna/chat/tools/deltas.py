"""What a stream of an answer hands out, and the whole that its pieces make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer's content."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """The ``index``-th call of the answer, counted from 0, begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """A piece of a call's arguments. All pieces of a call together are the JSON text of an object."""

    index: int
    fragment: str


Delta = TextDelta | ToolCallStart | ToolCallArguments


@dataclass(frozen=True)
class ToolCall:
    """A call: ``arguments`` is the JSON text of an object, or the beginning of one where the answer broke off."""

    id: str
    name: str
    arguments: str


def collect(deltas: Iterable[Delta]) -> tuple[str, list[ToolCall]]:
    """The content and the calls of a whole answer."""
    text: list[str] = []
    calls: list[tuple[ToolCallStart, list[str]]] = []
    for delta in deltas:
        if isinstance(delta, TextDelta):
            text.append(delta.text)
        elif isinstance(delta, ToolCallStart):
            calls.append((delta, []))
        else:
            calls[delta.index][1].append(delta.fragment)
    return "".join(text), [ToolCall(start.id, start.name, "".join(parts)) for start, parts in calls]
