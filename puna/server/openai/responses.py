"""/v1/responses: answers that the server remembers, so that a conversation goes on from one to the next."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from puna.chat.messages import Message
from puna.engine import Constraint
from puna.errors import PunaError, RequestError
from puna.llm import LLM
from puna.server.asking import ChatAsk, chat_pieces, chat_prompt
from puna.server.auth import Tenant
from puna.server.http_errors import FieldError
from puna.server.manager import ServedModel
from puna.server.openai.answers import error_event
from puna.server.openai.response_events import Event, ResponseEvents
from puna.server.openai.response_fields import (
    AllowedTools,
    FunctionTool,
    NamedTool,
    Other,
    ResponseBody,
    SchemaFormat,
)
from puna.server.openai.response_input import PlainItem, messages_of, plain_items
from puna.server.openai.response_store import ResponseStore
from puna.server.openai.sampling import sampling_of
from puna.server.records import new_id, page
from puna.server.sending import EventStream, json_response, sse, to_json, unless_disconnected
from puna.server.service import Service, TheService

router = APIRouter(tags=["OpenAI"])

_LOGPROBS = "message.output_text.logprobs"


@router.post("/v1/responses", response_model=None)
async def create_response(body: ResponseBody, request: Request, service: TheService, tenant: Tenant) -> Response:
    """Answer, at once or as server-sent events, and remember it unless ``store`` is false."""
    if body.stream:
        lines = _lines(response_events(service, body, tenant, tenant))
        return await unless_disconnected(request, EventStream.start(lines, error_event))
    return await unless_disconnected(request, respond(service, body, tenant, tenant))


@router.post("/v1/responses/input_tokens", response_model=None)
async def count_input_tokens(body: ResponseBody, service: TheService, tenant: Tenant) -> Response:
    """How many tokens the prompt of a response would have, exactly."""
    before, items = await _conversation(service, body, tenant)
    async with service.manager.use(body.model) as model:
        ask = await asyncio.to_thread(response_ask, model, body, [*before, *items], tenant)
        prompt = await asyncio.to_thread(chat_prompt, model, ask)
    return json_response({"object": "response.input_tokens", "input_tokens": len(prompt.ids)})


@router.get("/v1/responses/{response_id}", response_model=None)
async def retrieve_response(
    response_id: str,
    service: TheService,
    tenant: Tenant,
    stream: bool = False,
    include: Annotated[list[str] | None, Query(alias="include[]")] = None,
) -> Response:
    """A stored response. ``include`` is accepted without effect."""
    if stream:
        raise FieldError("stream: only a response that is made in the background could be streamed again", "stream")
    store = ResponseStore(service.store.home)
    return json_response(await asyncio.to_thread(store.response, tenant, response_id))


@router.delete("/v1/responses/{response_id}", response_model=None)
async def delete_response(response_id: str, service: TheService, tenant: Tenant) -> Response:
    """Forget a response. Conversations that went on from it end with it."""
    await asyncio.to_thread(ResponseStore(service.store.home).records.delete, tenant, response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.get("/v1/responses/{response_id}/input_items", response_model=None)
async def list_input_items(
    response_id: str,
    service: TheService,
    tenant: Tenant,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    include: Annotated[list[str] | None, Query(alias="include[]")] = None,
) -> Response:
    """What a stored response answered. ``include`` is accepted without effect."""
    items = await asyncio.to_thread(ResponseStore(service.store.home).input_items, tenant, response_id)
    return json_response(page(items if order == "asc" else items[::-1], limit, after, "item"))


@router.post("/v1/responses/{response_id}/cancel", response_model=None)
async def cancel_response(response_id: str, service: TheService, tenant: Tenant) -> Response:
    """Refused: a response that is not made in the background ends with its connection."""
    await asyncio.to_thread(ResponseStore(service.store.home).response, tenant, response_id)
    raise FieldError(
        "only a response that is made in the background can be cancelled; close the connection", "response_id"
    )


async def respond(service: Service, body: ResponseBody, tenant: str, share: str) -> Response:
    """A whole response. Raises whatever is wrong with the request."""
    last: Event = {}
    async for event in response_events(service, body, tenant, share, streams=False):
        last = event
    return json_response(last["response"])


async def response_events(
    service: Service, body: ResponseBody, tenant: str, share: str, *, streams: bool = True
) -> AsyncGenerator[Event, None]:
    """The events of a response that is ``tenant``'s; the work counts to ``share``.

    Raises what is wrong with the request before the first event; afterwards, only if nothing ``streams``.
    """
    before, items = await _conversation(service, body, tenant)
    async with service.manager.use(body.model) as model:
        ask = await asyncio.to_thread(response_ask, model, body, [*before, *items], share)
        _prompt, pieces = await asyncio.to_thread(chat_pieces, model, ask)
        events = ResponseEvents(_new_response(body, ask), model.llm.tokenizer)
        async with pieces:
            for event in events.start():
                yield event
            try:
                async for piece in pieces:
                    for event in events.take(piece):
                        yield event
                if body.store is not False:
                    store = ResponseStore(service.store.home)
                    await asyncio.to_thread(store.keep, tenant, events.response, items)
            except PunaError as error:
                if not streams:
                    raise
                yield events.fail(error)
                return
        yield events.end()


async def _conversation(service: Service, body: ResponseBody, tenant: str) -> tuple[list[PlainItem], list[PlainItem]]:
    """What was said before, and what is sent now. Raises FieldError, NotFoundError, before any model is loaded."""
    check_response(body)
    store = ResponseStore(service.store.home)
    before = await asyncio.to_thread(store.history, tenant, body.previous_response_id)
    items = plain_items(body.input or ())
    if not (before or items):
        raise FieldError("input is empty; send a text or items", "input")
    return before, items


def check_response(body: ResponseBody) -> None:
    """Raises FieldError for what can't be honoured, before any model is loaded."""
    for name, remedy in (
        ("conversation", "; go on with previous_response_id"),
        ("prompt", "; send instructions and input"),
        ("context_management", "; use truncation"),
        ("moderation", "; ask /v1/moderations"),
    ):
        if getattr(body, name) is not None:
            raise FieldError(f"{name} is not supported{remedy}", name)
    if body.background:
        raise FieldError("background is not supported; use a batch, or stream the response", "background")
    if body.text is not None and body.text.verbosity in ("low", "high"):
        raise FieldError(
            "text.verbosity can't be honoured; say in the instructions how long to answer", "text.verbosity"
        )
    if body.top_logprobs and _LOGPROBS not in (body.include or ()):
        raise FieldError(f"top_logprobs needs {_LOGPROBS} in include", "top_logprobs")


def response_ask(model: ServedModel, body: ResponseBody, items: list[PlainItem], share: str) -> ChatAsk:
    """What the request asks of the model. Raises RequestError, FieldError."""
    tools, choice = _tools(body)
    messages = messages_of(items)
    if body.instructions is not None:
        messages.insert(0, Message("system", body.instructions))
    sampling = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "max_tokens": body.max_output_tokens,
        "logprobs": _LOGPROBS in (body.include or ()),
        "top_logprobs": body.top_logprobs or 0,
    }
    effort = None if body.reasoning is None else body.reasoning.effort
    return ChatAsk(
        sampling=sampling_of(model.llm, sampling),
        constraint=_constraint(model.llm, body),
        truncate=body.truncation == "auto",
        tenant=share,
        messages=messages,
        tools=[_template_tool(tool) for tool in tools],
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        think=False if effort == "none" else None,
        template_variables={} if effort is None else {"reasoning_effort": effort},
    )


def _tools(body: ResponseBody) -> tuple[list[FunctionTool], str]:
    """The tools that may be called, and ChatAsk's tool_choice. Raises FieldError."""
    tools: list[FunctionTool] = []
    for i, tool in enumerate(body.tools or ()):
        if isinstance(tool, Other):
            raise FieldError(f"tools.{i}: the server has no {tool.type} tool; only functions work", f"tools.{i}.type")
        if tool.name in [other.name for other in tools]:
            raise FieldError(f"tools has two functions named {tool.name!r}; names must differ", "tools")
        tools.append(tool)
    choice = body.tool_choice or "auto"
    if isinstance(choice, str):
        if choice == "required" and not tools:
            raise FieldError("tool_choice is required, but there are no tools to choose from", "tool_choice")
        return tools, choice
    if isinstance(choice, Other):
        raise FieldError(f"tool_choice: the server has no {choice.type} tool; only functions work", "tool_choice")
    wanted = [tool.name for tool in choice.tools] if isinstance(choice, AllowedTools) else [choice.name]
    unknown = next((name for name in wanted if name not in [tool.name for tool in tools]), None)
    if unknown is not None:
        raise FieldError(f"tool_choice names {unknown!r}, which is not among the tools", "tool_choice")
    if isinstance(choice, NamedTool):
        return tools, choice.name
    return [tool for tool in tools if tool.name in wanted], choice.mode


def _template_tool(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}


def _constraint(llm: LLM, body: ResponseBody) -> Constraint | None:
    wanted = None if body.text is None else body.text.format
    if wanted is None or wanted.type == "text":
        return None
    try:
        if isinstance(wanted, SchemaFormat):
            return llm.constraints.json_schema(wanted.schema_)
        return llm.constraints.json_object()
    except RequestError as error:
        raise FieldError(str(error), "text.format") from None


def _new_response(body: ResponseBody, ask: ChatAsk) -> dict[str, Any]:
    """The response before its first token: what was asked, and how it is answered."""
    shown = body.model_dump(include={"instructions", "max_output_tokens", "max_tool_calls", "previous_response_id"})
    effort = None if body.reasoning is None else body.reasoning.effort
    chosen = None if body.text is None else body.text.format
    text_format = {"type": "text"} if chosen is None else chosen.model_dump(by_alias=True, exclude_none=True)
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "completed_at": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "model": body.model,
        "output": [],
        **shown,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": effort, "summary": None},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": ask.sampling.temperature,
        "text": {"format": text_format, "verbosity": "medium"},
        "tool_choice": _shown_choice(body),
        "tools": [_shown_tool(tool) for tool in body.tools or () if isinstance(tool, FunctionTool)],
        "top_logprobs": ask.sampling.top_logprobs,
        "top_p": ask.sampling.top_p,
        "truncation": body.truncation or "disabled",
        "metadata": body.metadata or {},
    }


def _shown_choice(body: ResponseBody) -> Any:
    choice = body.tool_choice or "auto"
    return choice if isinstance(choice, str) else choice.model_dump()


def _shown_tool(tool: FunctionTool) -> dict[str, Any]:
    return {**tool.model_dump(), "parameters": tool.parameters, "strict": bool(tool.strict)}


async def _lines(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            yield sse(to_json(event), event["type"])
