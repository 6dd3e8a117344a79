"""Whole answers from their pieces, and the parts of a response that several routes have."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from puna.chat.tools import TextDelta, ThinkingDelta, ToolCallArguments, ToolCallStart
from puna.engine import PromptLogprob
from puna.errors import PunaError
from puna.llm import TokenLogprob
from puna.server.http_errors import error_content
from puna.server.pieces import EndReason, Piece, Pieces, Usage, check_finished
from puna.server.sending import sse, to_json

DONE = sse(b"[DONE]")
STARTED = b""  # nothing to tell yet, but the request is known to be good


@dataclass
class CalledTool:
    """``arguments`` is the text of a JSON object."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class Answer:
    """One whole answer."""

    text: str = ""
    thinking: str = ""
    calls: list[CalledTool] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish_reason: EndReason = "stop"
    stop: str | int | None = None
    usage: Usage | None = None
    prompt_logprobs: Sequence[PromptLogprob] | None = None

    def take(self, piece: Piece) -> None:
        """Raises CapacityError for an answer that the server gave up."""
        check_finished(piece)
        for delta in piece.deltas:
            match delta:
                case TextDelta(text):
                    self.text += text
                case ThinkingDelta(text):
                    self.thinking += text
                case ToolCallStart(_, call_id, name):
                    self.calls.append(CalledTool(call_id, name))
                case ToolCallArguments(index, fragment):
                    self.calls[index].arguments += fragment
        self.tokens += piece.tokens
        self.prompt_logprobs = piece.prompt_logprobs or self.prompt_logprobs
        if piece.finish_reason is not None:
            self.finish_reason, self.stop, self.usage = piece.finish_reason, piece.stop, piece.usage


async def collect(pieces: Pieces) -> list[Answer]:
    """All answers, whole, in their order. Raises RequestError, CapacityError."""
    answers = [Answer() for _ in pieces.requests]
    async for piece in pieces:
        answers[piece.index].take(piece)
    return answers


def usage_json(usages: Sequence[Usage | None], per_prompt: int = 1) -> dict[str, Any]:
    """Tokens of a whole response; the prompt of ``per_prompt`` answers that share one counts once."""
    known = [usage for usage in usages if usage is not None]
    prompt = sum(usage.prompt_tokens for usage in known[::per_prompt])
    generated = sum(usage.generated_tokens for usage in known)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in known[::per_prompt])},
    }


def header(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that every response begins with."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


class Chunks:
    """Makes the events of one stream; what they have in common is written once."""

    def __init__(self, head: dict[str, Any], with_usage: bool) -> None:
        self._head = to_json(head)[:-1] + b',"choices":'
        self._tail = b',"usage":null}' if with_usage else b"}"

    def event(self, choice: dict[str, Any]) -> bytes:
        return sse(self._head + to_json([choice]) + self._tail)

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The event before the last of a stream that was asked for its usage."""
        return sse(self._head + b'[],"usage":' + to_json(usage) + b"}")


def error_event(error: PunaError) -> bytes:
    """The end of a stream that fails."""
    return sse(to_json(error_content("/v1/", error))) + DONE
