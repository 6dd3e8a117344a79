"""From the engine's events to what an API sends: text, thinking, tool calls, log probabilities, the end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Protocol

from puna.chat.text_stream import TextStream
from puna.chat.tools import TextDelta, ThinkingDelta, ToolCallArguments, ToolCallStart
from puna.engine import Event, PromptLogprob, Request, Timings
from puna.errors import CapacityError, RequestError
from puna.llm import TokenLogprob
from puna.server.accounting import AnswerAccount
from puna.server.engine_thread import Answers
from puna.server.manager import ServedModel

EndReason = Literal["stop", "length", "tool_calls", "cancelled"]


Delta = TextDelta | ThinkingDelta | ToolCallStart | ToolCallArguments


class AnswerReader(Protocol):
    """Finds structure in an answer's text as it comes; what it gives, put together, loses nothing of the text."""

    def push(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


class PlainReader:
    """No structure: all of it is the answer."""

    def push(self, text: str) -> list[Delta]:
        return [TextDelta(text)] if text else []

    def finish(self) -> list[Delta]:
        return []


@dataclass
class Usage:
    """Tokens and seconds of one answer. ``generated_tokens`` counts the token that ended it too."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass
class Piece:
    """What has become known of the answer at place ``index``, since its last piece.

    The first piece of each answer has the ``prompt_logprobs`` that were asked for.
    The last piece of each answer has ``finish_reason`` and ``usage``; ``stop`` is the stop string or id that ended it.
    """

    index: int
    deltas: list[Delta] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: Sequence[PromptLogprob] | None = None
    finish_reason: EndReason | None = None
    stop: str | int | None = None
    usage: Usage | None = None

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas if isinstance(delta, TextDelta))

    @property
    def thinking(self) -> str:
        return "".join(delta.text for delta in self.deltas if isinstance(delta, ThinkingDelta))


def check_finished(piece: Piece) -> None:
    """Raises CapacityError when the answer was cut off by the server itself."""
    if piece.finish_reason == "cancelled":
        raise CapacityError("the model was unloaded before the answer was complete; send the request again", 1.0)


class Pieces:
    """The pieces of answers that run together; use as an async context manager, which cancels what is left of them.

    Iterating raises RequestError when a request fails.
    """

    def __init__(
        self,
        model: ServedModel,
        requests: Sequence[Request],
        reader: Callable[[], AnswerReader] = PlainReader,
        visible_ids: frozenset[int] = frozenset(),
    ) -> None:
        """``reader`` makes one for each answer; ``visible_ids`` are control tokens whose spelling it wants to see."""
        self.requests = requests
        self._model = model
        self._accounts: list[AnswerAccount] = []
        tokenizer = model.llm.tokenizer
        skip = tokenizer.special_ids - visible_ids
        self._answers: Answers | None = None
        self._texts = [
            _AnswerText(i, request, reader(), TextStream(tokenizer.token_bytes, request.params.stop, skip=skip))
            for i, request in enumerate(requests)
        ]

    async def __aenter__(self) -> Pieces:
        """Submit the requests. Raises RequestError."""
        begin, name = self._model.accounting.begin, self._model.name
        self._accounts = [begin(name, request.tenant, len(request.prompt_ids)) for request in self.requests]
        self._answers = await self._model.engine_thread.submit(self._model.llm.engine, self.requests)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._answers is not None
        self._answers.cancel()
        reason = "error" if isinstance(error, RequestError) else "cancelled"
        for index, account in enumerate(self._accounts):
            account.end(reason, self._answers.timings(index))

    async def __aiter__(self) -> AsyncIterator[Piece]:
        answers = self._answers
        assert answers is not None
        left = set(range(len(self.requests)))
        while left:
            changed: dict[int, Piece] = {}
            for index, event in await answers.next():
                if index not in left:
                    continue  # it has ended at a stop string, and the engine did not know yet
                piece = changed.setdefault(index, Piece(index))
                self._texts[index].take(event, piece, answers.timings(index))
                if piece.finish_reason is not None:
                    left.discard(index)
                    answers.cancel(index)
            for index, piece in changed.items():
                self._accounts[index].generated(self._texts[index].count)
                if piece.finish_reason is not None:
                    self._accounts[index].end(piece.finish_reason, answers.timings(index))
                yield piece


class _AnswerText:
    """One answer on its way to text. ``count`` is its tokens, the one that ended it too."""

    def __init__(self, index: int, request: Request, reader: AnswerReader, text: TextStream) -> None:
        self._index = index
        self._request = request
        self._reader = reader
        self._text = text
        self.count = 0
        self._calls = False

    def take(self, event: Event, piece: Piece, timings: Timings) -> None:
        if event.finish_reason == "error":
            raise RequestError(event.error or "the request failed")
        deltas: list[Delta] = []
        piece.prompt_logprobs = event.prompt_logprobs or piece.prompt_logprobs
        if event.token is not None or event.stop_id is not None:
            self.count += 1
        if event.token is not None:
            deltas += self._reader.push(self._text.push(event.token))
            if self._request.params.logprobs and event.logprob is not None:
                piece.tokens.append(TokenLogprob(event.token, event.logprob, list(event.top)))
        stopped = self._text.stopped
        if stopped is not None or event.finish_reason is not None:
            deltas += self._reader.push(self._text.finish())
            deltas += self._reader.finish()
        self._calls = self._calls or any(isinstance(delta, ToolCallStart) for delta in deltas)
        piece.deltas += deltas
        if stopped is not None or event.finish_reason is not None:
            reason: EndReason = "stop" if stopped is not None else event.finish_reason  # type: ignore[assignment]
            piece.finish_reason = "tool_calls" if self._calls and reason == "stop" else reason
            piece.stop = stopped if stopped is not None else event.stop_id
            piece.usage = Usage(
                timings.prompt_tokens,
                timings.cached_tokens,
                self.count,
                timings.queue_seconds,
                timings.prefill_seconds,
                timings.decode_seconds,
            )
