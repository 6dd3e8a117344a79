"""What /api/generate and /api/chat share: from a body to a question for the model, from its pieces to lines."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from fastapi import Request

from puna.chat.tools import ToolCallArguments, ToolCallStart
from puna.engine import SamplingParams
from puna.errors import RequestError
from puna.llm import TokenLogprob
from puna.llm.ollama_options import OllamaOptions, parse_options
from puna.server.asking import Ask
from puna.server.auth import tenant_of
from puna.server.manager import ServedModel
from puna.server.ollama.bodies import Generation, ModelUse
from puna.server.ollama.details import thinks
from puna.server.ollama.formats import constraint_of
from puna.server.ollama.streaming import Line
from puna.server.pieces import Piece, Pieces, Usage
from puna.server.service import Service
from puna.server.settings import parse_duration
from puna.tokenizer import Tokenizer


def now() -> str:
    return datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def keep_alive_of(body: ModelUse) -> float | None:
    """Seconds; None for the server's default. Raises RequestError."""
    return None if body.keep_alive is None else parse_duration(body.keep_alive, "keep_alive")


@dataclass
class Call:
    """One request to a model: its body, whom it is for, and since when it runs."""

    service: Service
    body: ModelUse
    tenant: str
    options: OllamaOptions
    started: float = field(default_factory=time.perf_counter)
    load_seconds: float = 0.0

    @classmethod
    def of(cls, service: Service, body: ModelUse, request: Request) -> Call:
        """Raises RequestError for options that are none."""
        return cls(service, body, tenant_of(request), parse_options(body.options or {}))

    def use(self) -> AbstractAsyncContextManager[ServedModel]:
        """The model, with the context that the options want."""
        return self.service.manager.use(
            self.body.model, keep_alive=keep_alive_of(self.body), context_length=self.options.num_ctx
        )

    def loaded(self) -> None:
        """The model is there."""
        self.load_seconds = time.perf_counter() - self.started

    @property
    def head(self) -> Line:
        """How every line begins."""
        return {"model": self.body.model, "created_at": now()}

    def times(self) -> Line:
        return {
            "total_duration": nanoseconds(time.perf_counter() - self.started),
            "load_duration": nanoseconds(self.load_seconds),
        }

    def statistics(self, usage: Usage) -> Line:
        """Durations in nanoseconds."""
        return {
            **self.times(),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": nanoseconds(usage.prefill_seconds),
            "eval_count": usage.generated_tokens,
            "eval_duration": nanoseconds(usage.decode_seconds),
        }


async def ask_of(model: ServedModel, call: Call, body: Generation) -> Ask:
    """What the body asks for, but for the prompt. Raises RequestError."""
    return Ask(
        _sampling_of(model, call, body),
        constraint=await constraint_of(model, body.format),
        context_length=call.options.num_ctx,
        truncate=bool(body.truncate),
        shift=bool(body.shift),
        num_keep=call.options.num_keep or 0,
        tenant=call.tenant,
    )


def _sampling_of(model: ServedModel, call: Call, body: Generation) -> SamplingParams:
    """The model's defaults with the body's options."""
    wanted = bool(body.logprobs)
    if body.top_logprobs and not wanted:
        raise RequestError("top_logprobs needs logprobs: true")
    return model.llm.sampling(**call.options.sampling, logprobs=wanted, top_logprobs=body.top_logprobs or 0)


def think_of(body: Generation, template: str) -> bool | None:
    """Raises RequestError when the model should think and its template has no place for it."""
    if body.think and not thinks(template):
        raise RequestError(f"{body.model} does not support thinking; remove the field think")
    return None if body.think is None else bool(body.think)


def logprob_lines(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer, with_top: bool) -> list[Line]:
    """The API's form of log probabilities."""

    def entry(token: int, logprob: float) -> Line:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

    lines = []
    for token in tokens:
        line = entry(token.token_id, token.logprob)
        if with_top:
            line["top_logprobs"] = [entry(*alternative) for alternative in token.top]
        lines.append(line)
    return lines


class ToolCalls:
    """Puts the fragments of calls together; a call is given out when it is whole."""

    def __init__(self) -> None:
        self._open: tuple[ToolCallStart, list[str]] | None = None

    def take(self, piece: Piece) -> tuple[list[Line], str]:
        """The calls that are whole now, and the text of one whose arguments broke off."""
        calls: list[Line] = []
        lost = ""
        for delta in piece.deltas:
            if isinstance(delta, ToolCallArguments) and self._open is not None:
                self._open[1].append(delta.fragment)
                continue
            lost += self._close(calls)
            if isinstance(delta, ToolCallStart):
                self._open = (delta, [])
        if piece.finish_reason is not None:
            lost += self._close(calls)
        return calls, lost

    def _close(self, calls: list[Line]) -> str:
        if self._open is None:
            return ""
        (start, fragments), self._open = self._open, None
        text = "".join(fragments)
        try:
            arguments = json.loads(text or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            return start.name + text
        function = {"index": start.index, "name": start.name, "arguments": arguments}
        calls.append({"id": start.id, "function": function})
        return ""


async def piece_lines(
    call: Call,
    model: ServedModel,
    body: Generation,
    pieces: Pieces,
    part: Callable[[str, str, list[Line]], Line],
    last: Callable[[], Line],
) -> AsyncGenerator[Line, None]:
    """The lines of an answer. ``part`` says how text, thinking and tool calls are told; ``last`` adds to the end."""
    calls = ToolCalls()
    tokenizer = model.llm.tokenizer
    async with pieces:
        async for piece in pieces:
            whole, lost = calls.take(piece)
            text, thinking = piece.text + lost, piece.thinking
            if text or thinking or whole or piece.tokens:
                line = {**call.head, **part(text, thinking, whole), "done": False}
                if piece.tokens:
                    line["logprobs"] = logprob_lines(piece.tokens, tokenizer, bool(body.top_logprobs))
                yield line
            if piece.finish_reason == "cancelled":
                raise RequestError(f"{body.model} was unloaded before the answer was complete")
            if piece.finish_reason is not None:
                assert piece.usage is not None
                reason = "length" if piece.finish_reason == "length" else "stop"
                end = {**call.head, **part("", "", []), "done": True, "done_reason": reason}
                yield {**end, **last(), **call.statistics(piece.usage)}


async def load_or_unload(call: Call, part: Line) -> Line:
    """What an empty prompt means: load the model, or with ``keep_alive`` 0 unload it."""
    if keep_alive_of(call.body) == 0:
        await call.service.manager.stop(call.body.model)
        return {**call.head, **part, "done": True, "done_reason": "unload"}
    async with call.use():
        call.loaded()
    return {**call.head, **part, "done": True, "done_reason": "load", **call.times()}


def joined(lines: Sequence[Line], texts: Callable[[Line], dict[str, Any]]) -> Line:
    """The last line with what all of them said; ``texts`` is the part of a line that has the texts."""
    whole = dict(lines[-1])
    logprobs = [entry for line in lines for entry in line.get("logprobs", ())]
    if logprobs:
        whole["logprobs"] = logprobs
    target = texts(whole)
    for key in ("response", "content", "thinking"):
        said = "".join(texts(line).get(key, "") for line in lines)
        if said or key in target:
            target[key] = said
    tool_calls = [entry for line in lines for entry in texts(line).get("tool_calls", ())]
    if tool_calls:
        target["tool_calls"] = tool_calls
    return whole
