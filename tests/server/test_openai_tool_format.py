"""Tool calls and reasoning as chat completions show them: whole, and in chunks that clients put together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openai.lib.streaming.chat._completions import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from openai_schemas import check

from puna.chat.tools import TextDelta, ThinkingDelta, ToolCallArguments, ToolCallStart
from puna.server.openai.answers import Answer
from puna.server.openai.chat_format import chat_choice, chat_deltas, opening_delta
from puna.server.pieces import Piece

NO_TOKENIZER: Any = SimpleNamespace()
PIECES = [
    Piece(0, [ThinkingDelta("The user "), ThinkingDelta("wants weather.")]),
    Piece(0, [TextDelta("Let me "), TextDelta("see.")]),
    Piece(0, [ToolCallStart(0, "call_a", "weather"), ToolCallArguments(0, '{"city": '), ToolCallArguments(0, '"O')]),
    Piece(0, [ToolCallArguments(0, 'slo"}'), ToolCallStart(1, "call_b", "time"), ToolCallArguments(1, "{}")]),
    Piece(0, [], finish_reason="tool_calls"),
]
CALLS = [
    {"id": "call_a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
    {"id": "call_b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
]
HEAD = {"id": "x", "created": 1, "model": "m"}


def test_whole(shared_data: Path) -> None:
    answer = Answer()
    for piece in PIECES:
        answer.take(piece)
    choice = chat_choice(0, answer, NO_TOKENIZER, False)
    check(shared_data, "CreateChatCompletionResponse", {**HEAD, "object": "chat.completion", "choices": [choice]})
    assert choice["message"]["content"] == "Let me see."
    assert choice["message"]["reasoning_content"] == "The user wants weather."
    assert choice["message"]["tool_calls"] == CALLS
    assert choice["finish_reason"] == "tool_calls"


def test_calls_alone_have_no_content() -> None:
    answer = Answer()
    answer.take(Piece(0, [ToolCallStart(0, "call_a", "f"), ToolCallArguments(0, "{}")], finish_reason="tool_calls"))
    assert chat_choice(0, answer, NO_TOKENIZER, False)["message"]["content"] is None


@pytest.mark.parametrize("together", [False, True])
def test_chunks_put_together_by_openais_own_client(shared_data: Path, together: bool) -> None:
    pieces = PIECES
    if together:  # all in one piece, so that a call begins and ends in one chunk
        pieces = [Piece(0, [delta for piece in PIECES for delta in piece.deltas], finish_reason="tool_calls")]
    choices = [opening_delta(0), *(choice for p in pieces for choice in chat_deltas(p, NO_TOKENIZER, False))]
    state = ChatCompletionStreamState()
    for choice in choices:
        chunk = {**HEAD, "object": "chat.completion.chunk", "choices": [choice]}
        check(shared_data, "CreateChatCompletionStreamResponse", chunk)
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    message = state.get_final_completion().choices[0].message.model_dump()
    assert message["content"] == "Let me see."
    assert message["reasoning_content"] == "The user wants weather."
    assert [
        {"id": c["id"], "type": c["type"], "function": {k: c["function"][k] for k in ("name", "arguments")}}
        for c in message["tool_calls"]
    ] == CALLS
