"""/v1/completions: raw text or tokens, continued."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from puna.engine import Request as EngineRequest
from puna.llm import LLM
from puna.server.asking import Ask, infill_prompt, texts_pieces
from puna.server.auth import Tenant
from puna.server.http_errors import FieldError
from puna.server.manager import ServedModel
from puna.server.openai.answers import (
    DONE,
    STARTED,
    Answer,
    Chunks,
    collect,
    error_event,
    header,
    usage_json,
)
from puna.server.openai.chat import last_tokens
from puna.server.openai.fields import GenerationBody, TokenIds
from puna.server.openai.logprobs import completion_logprobs, prompt_logprobs, token_text
from puna.server.openai.sampling import check_ids, constraint_of, sampling_params
from puna.server.pieces import Pieces, Usage
from puna.server.sending import EventStream, json_response, unless_disconnected
from puna.server.service import Service, TheService

router = APIRouter(tags=["OpenAI"])

DEFAULT_MAX_TOKENS = 16  # as the API documents
MAX_ANSWERS = 2048  # of one request: prompts times best_of


class CompletionBody(GenerationBody):
    """A request for completions."""

    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1)] | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=0, le=128)] | None = None
    suffix: str | None = Field(None, description="For models with a template that has a place for it.")


def check_completion(body: CompletionBody) -> None:
    """Raises FieldError for what can't be honoured, before any model is loaded."""
    if body.stream and body.prompt_logprobs is not None:
        raise FieldError("prompt_logprobs can't be streamed", "prompt_logprobs")
    n = body.n or 1
    if body.suffix and not isinstance(body.prompt, str):
        raise FieldError("suffix needs a prompt that is one text", "suffix")
    if body.best_of is not None and body.best_of < n:
        raise FieldError(f"best_of ({body.best_of}) must be at least n ({n})", "best_of")
    if body.stream and (body.best_of or n) > n:
        raise FieldError("best_of can't be streamed: the best is known only at the end", "best_of")
    if len(prompts_of(body)) * (body.best_of or n) > MAX_ANSWERS:
        raise FieldError(f"a request may have at most {MAX_ANSWERS} answers; send several", "prompt")


def prompt_ids(llm: LLM, prompt: str | Sequence[int]) -> list[int]:
    """A prompt as tokens; control tokens that a text spells are such, as in a prompt that a template wrote.

    Raises FieldError.
    """
    if isinstance(prompt, str):
        return llm.encode(prompt, parse_special=True)
    check_ids(llm, prompt, "prompt")
    return list(prompt)


def prompts_as_ids(llm: LLM, body: CompletionBody) -> list[list[int]]:
    """The tokens of every prompt, before any is cut. Raises FieldError."""
    if not body.suffix:
        return [prompt_ids(llm, prompt) for prompt in prompts_of(body)]
    template = llm.template if llm.has_template else None
    ids = None if template is None else infill_prompt(template, llm.tokenizer, str(body.prompt), body.suffix)
    if ids is None:
        raise FieldError(f"suffix: the template of {body.model} has no place for one; send the prompt alone", "suffix")
    return [ids]


def prompts_of(body: CompletionBody) -> Sequence[str | Sequence[int]]:
    """The prompts of a request, one or many."""
    given = body.prompt
    if isinstance(given, str) or isinstance(given[0], int):
        return [given]
    return given


async def completion_ask(model: ServedModel, body: CompletionBody, tenant: str) -> Ask:
    """What the request asks of the model. Raises RequestError, FieldError."""
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    best_of = max(body.best_of or 1, body.n or 1)
    return Ask(
        sampling=sampling_params(
            model.llm,
            body,
            max_tokens=max_tokens,
            prompt_logprobs=_prompt_logprobs(body),
            logprobs=body.logprobs is not None or best_of > (body.n or 1),
            top_logprobs=body.logprobs or 0,
        ),
        n=best_of,
        constraint=await constraint_of(model.llm, body.response_format, body.structured_outputs),
        last_tokens=last_tokens(model, body),
        tenant=tenant,
    )


def _prompt_logprobs(body: CompletionBody) -> int | None:
    """What the engine must know of the prompt: for an echo with logprobs, and where nothing is generated at all."""
    wanted = [body.prompt_logprobs, body.logprobs if body.echo else None, 0 if body.max_tokens == 0 else None]
    return max((count for count in wanted if count is not None), default=None)


@asynccontextmanager
async def completion_answers(
    service: Service, body: CompletionBody, tenant: str
) -> AsyncIterator[tuple[ServedModel, Ask, Pieces]]:
    """The model, what it was asked, and the answers on their way. Raises whatever is wrong with the request."""
    check_completion(body)
    async with service.manager.use(body.model) as model:
        ask = await completion_ask(model, body, tenant)

        def prepare() -> Pieces:
            prompts = prompts_as_ids(model.llm, body)
            if not all(prompts):
                raise FieldError("prompt has no tokens; give it at least one character", "prompt")
            return texts_pieces(model, prompts, ask)

        async with await asyncio.to_thread(prepare) as pieces:
            yield model, ask, pieces


@router.post("/v1/completions", response_model=None)
async def create_completion(body: CompletionBody, request: Request, service: TheService, tenant: Tenant) -> Response:
    """Continue a text."""
    if body.stream:
        return await EventStream.start(_stream(service, body, tenant), error_event)
    return await unless_disconnected(request, complete_text(service, body, tenant))


async def complete_text(service: Service, body: CompletionBody, tenant: str) -> Response:
    async with completion_answers(service, body, tenant) as (model, ask, pieces):
        answers = await collect(pieces)
        formats = _formats(model.llm, body, ask, pieces)
    choices: list[dict[str, Any]] = []
    for start in range(0, len(answers), ask.n):
        order = list(range(start, start + ask.n))
        if ask.n > (body.n or 1):
            order = sorted(order, key=lambda i: -_mean_logprob(answers[i]))[: body.n or 1]
        choices += [formats[i].choice(len(choices) + place, answers[i]) for place, i in enumerate(order)]
    usage = usage_json([answer.usage for answer in answers], ask.n)
    return json_response({**header("cmpl", "text_completion", body.model), "choices": choices, "usage": usage})


async def _stream(service: Service, body: CompletionBody, tenant: str) -> AsyncGenerator[bytes, None]:
    async with completion_answers(service, body, tenant) as (model, ask, pieces):
        chunks = Chunks(header("cmpl", "text_completion", body.model), body.wants_usage)
        formats = _formats(model.llm, body, ask, pieces)
        usages: list[Usage | None] = [None] * len(formats)
        yield STARTED
        async for piece in pieces:
            answer = Answer()
            answer.take(piece)
            usages[piece.index] = piece.usage or usages[piece.index]
            if piece.text or piece.tokens or piece.finish_reason is not None:
                yield chunks.event(formats[piece.index].choice(piece.index, answer, piece.finish_reason is not None))
        if body.wants_usage:
            yield chunks.usage(usage_json(usages, ask.n))
        yield DONE


def _formats(llm: LLM, body: CompletionBody, ask: Ask, pieces: Pieces) -> list[_ChoiceFormat]:
    """One for each answer."""
    prompts = prompts_of(body)
    return [_ChoiceFormat(llm, body, prompts[i // ask.n], request) for i, request in enumerate(pieces.requests)]


class _ChoiceFormat:
    """Shows one answer, in one piece or several; the first has the prompt where it is to be echoed."""

    def __init__(self, llm: LLM, body: CompletionBody, prompt: str | Sequence[int], request: EngineRequest) -> None:
        self._tokenizer = llm.tokenizer
        self._wanted = body.logprobs
        self._shows_prompt_logprobs = body.prompt_logprobs is not None
        self._offset = 0
        self._echo = ""
        self._echoes = bool(body.echo)
        if self._echoes:
            ids = request.prompt_ids
            whole = isinstance(prompt, str) and body.truncate_prompt_tokens is None
            self._echo = str(prompt) if whole else self._tokenizer.decode(ids).decode("utf-8", "replace")
            # Before the text is what it doesn't show: a BOS that was added, a space that the vocabulary puts there.
            self._offset = len(self._echo) - sum(len(token_text(self._tokenizer, token)) for token in ids)

    def choice(self, index: int, answer: Answer, finished: bool = True) -> dict[str, Any]:
        """One of the ``choices``."""
        choice: dict[str, Any] = {
            "index": index,
            "text": self._echo + answer.text,
            "logprobs": self._logprobs(answer),
            "finish_reason": answer.finish_reason if finished else None,
        }
        if self._shows_prompt_logprobs and answer.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(self._tokenizer, answer.prompt_logprobs)
        self._echo, self._echoes = "", False
        return choice

    def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if self._wanted is None:
            return None
        prompt = answer.prompt_logprobs if self._echoes and answer.prompt_logprobs is not None else ()
        found = completion_logprobs(self._tokenizer, prompt, answer.tokens, self._wanted, self._offset)
        self._offset += sum(map(len, found["tokens"]))
        return found


def _mean_logprob(answer: Answer) -> float:
    return sum(token.logprob for token in answer.tokens) / max(len(answer.tokens), 1)
