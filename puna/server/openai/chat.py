"""/v1/chat/completions: the request's fields, and what is asked of the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from puna.server.asking import ChatAsk, chat_pieces
from puna.server.auth import Tenant
from puna.server.http_errors import FieldError
from puna.server.manager import ServedModel
from puna.server.openai.answers import DONE, Chunks, collect, error_event, header, usage_json
from puna.server.openai.chat_format import chat_choice, chat_deltas, opening_delta
from puna.server.openai.fields import GenerationBody, Text
from puna.server.openai.logprobs import prompt_logprobs
from puna.server.openai.messages import ChatMessage, ChoiceWord, Tool, ToolChoice, plain_messages, plain_tools
from puna.server.openai.sampling import constraint_of, sampling_params
from puna.server.pieces import Pieces, Usage
from puna.server.sending import EventStream, json_response, unless_disconnected
from puna.server.service import Service, TheService

router = APIRouter(tags=["OpenAI"])

_NO_EFFECT = "Accepted without effect."
_REFUSED = "Refused unless null."
# What a template's variables may not replace.
RESERVED_VARIABLES = frozenset(
    ("messages", "tools", "template", "tokenizer", "add_generation_prompt", "continue_final_message")
)


class ChatBody(GenerationBody):
    """A request for a chat completion."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="The old name of max_completion_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: ChoiceWord | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: Text | None = Field(None, description="Jinja, run in a sandbox.")
    chat_template_kwargs: dict[str, Any] | None = None

    store: bool | None = Field(None, description="Accepted: chat completions are never stored.")
    metadata: dict[str, str] | None = Field(None, description="Returned with the response.")
    service_tier: str | None = Field(None, description=_NO_EFFECT)
    safety_identifier: str | None = Field(None, description=_NO_EFFECT)
    prompt_cache_key: str | None = Field(None, description="Accepted: prefixes are cached without being asked.")
    prompt_cache_retention: str | None = Field(None, description=_NO_EFFECT)
    prompt_cache_options: Any = Field(None, description=_NO_EFFECT)
    prediction: Any = Field(None, description=_NO_EFFECT)
    modalities: list[Literal["text", "audio"]] | None = Field(None, description="Text only.")
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Medium only.")
    audio: Any = Field(None, description=_REFUSED)
    web_search_options: Any = Field(None, description=_REFUSED)
    moderation: Any = Field(None, description=_REFUSED)
    functions: Any = Field(None, description=f"{_REFUSED} Use tools.")
    function_call: Any = Field(None, description=f"{_REFUSED} Use tool_choice.")


def check_chat(body: ChatBody) -> None:
    """Raises FieldError for what can't be honoured, before any model is loaded."""
    for name, remedy in (
        ("audio", "this model answers in text"),
        ("web_search_options", "this server does not search; give the model a tool that does"),
        ("moderation", "ask for it separately"),
        ("functions", "use tools"),
        ("function_call", "use tool_choice"),
    ):
        if getattr(body, name) is not None:
            raise FieldError(f"{name} is not supported; {remedy}", name)
    if "audio" in (body.modalities or ()):
        raise FieldError("modalities: audio is not supported; this model answers in text", "modalities")
    if body.verbosity in ("low", "high"):
        raise FieldError("verbosity can't be honoured; say in a message how long the answer should be", "verbosity")
    if body.top_logprobs is not None and not body.logprobs:
        raise FieldError("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise FieldError("prompt_logprobs can't be streamed", "prompt_logprobs")
    if body.continue_final_message and body.add_generation_prompt:
        raise FieldError(
            "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
        )
    reserved = sorted(RESERVED_VARIABLES & (body.chat_template_kwargs or {}).keys())
    if reserved:
        raise FieldError(f"chat_template_kwargs must not set {reserved[0]}", "chat_template_kwargs")


async def chat_ask(model: ServedModel, body: ChatBody, tenant: str) -> ChatAsk:
    """What the request asks of the model. Raises RequestError, FieldError."""
    llm = model.llm
    tools, tool_choice = plain_tools(body.tools, body.tool_choice)
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    return ChatAsk(
        sampling=sampling_params(
            llm,
            body,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            prompt_logprobs=body.prompt_logprobs,
            logprobs=bool(body.logprobs),
            top_logprobs=body.top_logprobs or 0,
        ),
        n=body.n or 1,
        constraint=await constraint_of(llm, body.response_format, body.structured_outputs),
        last_tokens=last_tokens(model, body),
        tenant=tenant,
        messages=plain_messages(body.messages),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        think=False if body.reasoning_effort == "none" else None,
        template=body.chat_template,
        template_variables=variables,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
    )


def last_tokens(model: ServedModel, body: GenerationBody) -> int | None:
    """How many of the prompt's last tokens to keep: -1 leaves one place for the answer."""
    wanted = body.truncate_prompt_tokens
    return model.llm.context_length - 1 if wanted == -1 else wanted


@asynccontextmanager
async def chat_answers(service: Service, body: ChatBody, tenant: str) -> AsyncIterator[tuple[ServedModel, Pieces]]:
    """The model, and the answers on their way. Raises whatever is wrong with the request."""
    check_chat(body)
    async with service.manager.use(body.model) as model:
        ask = await chat_ask(model, body, tenant)
        _prompt, pieces = await asyncio.to_thread(chat_pieces, model, ask)
        async with pieces:
            yield model, pieces


@router.post("/v1/chat/completions", response_model=None)
async def create_chat_completion(body: ChatBody, request: Request, service: TheService, tenant: Tenant) -> Response:
    """Answer a conversation."""
    if body.stream:
        return await EventStream.start(_stream(service, body, tenant), error_event)
    return await unless_disconnected(request, complete_chat(service, body, tenant))


async def complete_chat(service: Service, body: ChatBody, tenant: str) -> Response:
    async with chat_answers(service, body, tenant) as (model, pieces):
        answers = await collect(pieces)
        tokenizer = model.llm.tokenizer
    choices = [chat_choice(i, answer, tokenizer, bool(body.logprobs)) for i, answer in enumerate(answers)]
    usage = usage_json([answer.usage for answer in answers], len(answers))
    response = {**header("chatcmpl", "chat.completion", body.model), "choices": choices, "usage": usage}
    if answers[0].prompt_logprobs is not None:
        response["prompt_logprobs"] = prompt_logprobs(tokenizer, answers[0].prompt_logprobs)
    if body.metadata is not None:
        response["metadata"] = body.metadata
    return json_response(response)


async def _stream(service: Service, body: ChatBody, tenant: str) -> AsyncGenerator[bytes, None]:
    async with chat_answers(service, body, tenant) as (model, pieces):
        tokenizer = model.llm.tokenizer
        chunks = Chunks(header("chatcmpl", "chat.completion.chunk", body.model), body.wants_usage)
        count = len(pieces.requests)
        for index in range(count):
            yield chunks.event(opening_delta(index))
        usages: list[Usage | None] = [None] * count
        async for piece in pieces:
            usages[piece.index] = piece.usage or usages[piece.index]
            for choice in chat_deltas(piece, tokenizer, bool(body.logprobs)):
                yield chunks.event(choice)
        if body.wants_usage:
            yield chunks.usage(usage_json(usages, count))
        yield DONE
