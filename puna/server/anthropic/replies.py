"""From the pieces of an answer to Anthropic's events, and from the events to a whole message."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from typing import Any

from puna.chat.tools import TextDelta, ThinkingDelta, ToolCallStart
from puna.server.pieces import Delta, Piece, Usage, check_finished

Event = dict[str, Any]
_EMPTY_BLOCKS = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


class MessageEvents:
    """The events of one message, in their order: ``start``, then ``take`` for every piece."""

    def __init__(self, model: str, prompt_tokens: int, stop_sequences: Collection[str]) -> None:
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._stop_sequences = stop_sequences
        self._open: str | None = None  # the type of the block that is being written
        self._index = -1

    def start(self) -> list[Event]:
        """What is known before the first token. How much of the prompt was cached is known at the end."""
        message: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(self._prompt_tokens, 0, 0),
        }
        return [{"type": "message_start", "message": message}, {"type": "ping"}]

    def take(self, piece: Piece) -> list[Event]:
        """Raises CapacityError for an answer that the server gave up."""
        check_finished(piece)
        events: list[Event] = []
        for delta in piece.deltas:
            events += self._delta(delta)
        if piece.finish_reason is not None:
            assert piece.usage is not None
            events += self._close()
            events.append(self._end(piece, piece.usage))
            events.append({"type": "message_stop"})
        return events

    def _delta(self, delta: Delta) -> list[Event]:
        if isinstance(delta, ToolCallStart):
            block = {"type": "tool_use", "id": delta.id, "name": delta.name, "input": {}}
            return [*self._close(), self._begin(block)]
        events: list[Event] = []
        if isinstance(delta, (TextDelta, ThinkingDelta)):
            kind = "text" if isinstance(delta, TextDelta) else "thinking"
            if self._open != kind:
                events = [*self._close(), self._begin(_EMPTY_BLOCKS[kind])]
            change = {"type": f"{kind}_delta", kind: delta.text}
        else:
            change = {"type": "input_json_delta", "partial_json": delta.fragment}
        return [*events, {"type": "content_block_delta", "index": self._index, "delta": change}]

    def _begin(self, block: dict[str, Any]) -> Event:
        self._index += 1
        self._open = block["type"]
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _close(self) -> list[Event]:
        if self._open is None:
            return []
        self._open = None
        return [{"type": "content_block_stop", "index": self._index}]

    def _end(self, piece: Piece, usage: Usage) -> Event:
        reason, sequence = "end_turn", None
        if piece.finish_reason == "tool_calls":
            reason = "tool_use"
        elif piece.finish_reason == "length":
            reason = "max_tokens"
        elif isinstance(piece.stop, str) and piece.stop in self._stop_sequences:
            reason, sequence = "stop_sequence", piece.stop
        return {
            "type": "message_delta",
            "delta": {"stop_reason": reason, "stop_sequence": sequence},
            "usage": _usage(usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens),
        }


def whole_message(events: Iterable[Event]) -> dict[str, Any]:
    """The message that the events tell of, put together as a client does it."""
    message: dict[str, Any] = {}
    parts: list[list[str]] = []
    for event in events:
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            message["content"].append(dict(event["content_block"]))
            parts.append([])
        elif event["type"] == "content_block_delta":
            parts[-1].append(next(value for name, value in event["delta"].items() if name != "type"))
        elif event["type"] == "message_delta":
            message |= event["delta"]
            message["usage"] = event["usage"]
    for block, texts in zip(message["content"], parts, strict=True):
        _fill(block, texts)
    return message


def _fill(block: dict[str, Any], texts: Sequence[str]) -> None:
    if block["type"] != "tool_use":
        block[block["type"]] = "".join(texts)
        return
    with suppress(ValueError):  # the answer may have broken off within the arguments, as its stop_reason says
        block["input"] = json.loads("".join(texts))


def _usage(prompt: int, cached: int, generated: int) -> dict[str, int]:
    """Anthropic counts the tokens of a prompt that were read from a cache apart from the others."""
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": generated,
    }
