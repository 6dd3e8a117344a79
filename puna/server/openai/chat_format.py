"""Answers as chat completions show them, whole and in chunks."""

from __future__ import annotations

from typing import Any

from puna.chat.tools import TextDelta, ThinkingDelta, ToolCallArguments, ToolCallStart
from puna.server.openai.answers import Answer
from puna.server.openai.logprobs import chat_logprobs
from puna.server.pieces import Piece, check_finished
from puna.tokenizer import Tokenizer


def chat_choice(index: int, answer: Answer, tokenizer: Tokenizer, with_logprobs: bool) -> dict[str, Any]:
    """One of the ``choices`` of a whole response."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.thinking:
        message["reasoning_content"] = answer.thinking
    if answer.calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": chat_logprobs(tokenizer, answer.tokens) if with_logprobs else None,
        "finish_reason": answer.finish_reason,
    }


def opening_delta(index: int) -> dict[str, Any]:
    """The first chunk of an answer."""
    return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def chat_deltas(piece: Piece, tokenizer: Tokenizer, with_logprobs: bool) -> list[dict[str, Any]]:
    """The chunks of a piece: one with what is new, if anything is, and one with the end. Raises CapacityError."""
    check_finished(piece)
    choices: list[dict[str, Any]] = []
    logprobs = chat_logprobs(tokenizer, piece.tokens) if with_logprobs and piece.tokens else None
    delta = _delta(piece)
    if delta or logprobs:
        choices.append({"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": None})
    if piece.finish_reason is not None:
        choices.append({"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason})
    return choices


def _delta(piece: Piece) -> dict[str, Any]:
    """What is new, merged: one text, one reasoning, and one entry for each tool call."""
    merged: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for delta in piece.deltas:
        match delta:
            case TextDelta(text):
                merged["content"] = merged.get("content", "") + text
            case ThinkingDelta(text):
                merged["reasoning_content"] = merged.get("reasoning_content", "") + text
            case ToolCallStart(index, call_id, name):
                calls[index] = {
                    "index": index,
                    "id": call_id,
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
            case ToolCallArguments(index, fragment):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += fragment
    if calls:
        merged["tool_calls"] = list(calls.values())
    return merged
