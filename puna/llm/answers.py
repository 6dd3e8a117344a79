"""From the engine's events to text: streaming chunks and finished completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from puna.chat.text_stream import TextStream
from puna.engine import Engine, Event, FinishReason, Request, Stream, Timings
from puna.errors import RequestError
from puna.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token's log probability (natural logarithm), and the most probable tokens of its place."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer: text that is safe to show, and the token that completed it, if one did.

    ``index`` is the prompt's place in the list. The last chunk of an answer has ``finish_reason`` and ``timings``.
    """

    index: int
    text: str
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None


@dataclass
class Completion:
    """A whole answer. ``finish_reason``: ``stop`` (end token, stop string or complete constraint) or ``length``."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    timings: Timings
    prompt_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None


class _Answer:
    """One request on its way: its stream of events, and the text assembled so far."""

    def __init__(self, index: int, stream: Stream, tokenizer: Tokenizer) -> None:
        self.index = index
        self.stream = stream
        self._text = TextStream(tokenizer.token_bytes, stream.request.params.stop, skip=tokenizer.special_ids)

    def chunk(self, event: Event) -> Chunk:
        text = "" if event.token is None else self._text.push(event.token)
        reason: FinishReason | None = "stop" if self._text.stopped is not None else event.finish_reason
        if reason is not None:
            text += self._text.finish()
        logprob = None
        if self.stream.request.params.logprobs and event.token is not None and event.logprob is not None:
            logprob = TokenLogprob(event.token, event.logprob, list(event.top))
        timings = self.stream.timings if reason is not None else None
        return Chunk(self.index, text, event.token, logprob, reason, timings)


def stream_chunks(engine: Engine, requests: Sequence[Request], tokenizer: Tokenizer) -> Iterator[Chunk]:
    """Run requests together and give every piece of text as it comes.

    Closing the iterator cancels what is still running. Raises RequestError when a request fails.
    """
    running: dict[int, _Answer] = {}
    try:
        for index, request in enumerate(requests):
            stream = engine.submit(request)
            running[stream.id] = _Answer(index, stream, tokenizer)
        while running:
            # Other callers may step the same engine, so events are taken from the streams, not from step().
            arrived = [(answer, event) for answer in running.values() for event in answer.stream.take()]
            if not arrived:
                engine.step()
            for answer, event in arrived:
                if answer.stream.id not in running:
                    continue
                if event.finish_reason == "error":
                    del running[event.request_id]
                    raise RequestError(event.error or "the request failed")
                chunk = answer.chunk(event)
                if chunk.finish_reason is not None:
                    del running[event.request_id]
                    engine.cancel(event.request_id)  # a stop string ends an answer that the engine would go on with
                yield chunk
    finally:
        for request_id in running:
            engine.cancel(request_id)


def collect(chunks: Iterator[Chunk], requests: Sequence[Request]) -> list[Completion]:
    """The whole answers, in the order of their requests."""
    texts: list[list[str]] = [[] for _ in requests]
    tokens: list[list[int]] = [[] for _ in requests]
    logprobs: list[list[TokenLogprob]] = [[] for _ in requests]
    last: dict[int, Chunk] = {}
    for chunk in chunks:
        texts[chunk.index].append(chunk.text)
        if chunk.token_id is not None:
            tokens[chunk.index].append(chunk.token_id)
        if chunk.logprob is not None:
            logprobs[chunk.index].append(chunk.logprob)
        last[chunk.index] = chunk
    completions = []
    for i, request in enumerate(requests):
        reason, timings = last[i].finish_reason, last[i].timings
        assert reason is not None
        assert timings is not None
        completions.append(
            Completion(
                text="".join(texts[i]),
                token_ids=tokens[i],
                finish_reason=reason,
                timings=timings,
                prompt_ids=list(request.prompt_ids),
                logprobs=logprobs[i] if request.params.logprobs else None,
            )
        )
    return completions
