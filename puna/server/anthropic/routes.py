"""The routes of Anthropic's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import Response

from puna.errors import PunaError
from puna.server.anthropic.fields import CountRequest, MessagesRequest
from puna.server.anthropic.parsing import count_ask, messages_ask
from puna.server.anthropic.replies import Event, MessageEvents, whole_message
from puna.server.asking import chat_pieces, chat_prompt
from puna.server.auth import Tenant
from puna.server.http_errors import error_content
from puna.server.sending import EventStream, json_response, sse, to_json, unless_disconnected
from puna.server.service import Service, TheService

router = APIRouter(tags=["Anthropic"])


@router.post("/v1/messages", response_model=None)
async def messages(body: MessagesRequest, request: Request, service: TheService, tenant: Tenant) -> Response:
    """Answer a conversation, at once or as server-sent events."""
    events = _events(body, service, tenant)
    if body.stream:
        return await unless_disconnected(request, EventStream.start(_lines(events), _error_event))
    return await unless_disconnected(request, _whole(events))


@router.post("/v1/messages/count_tokens", response_model=None)
async def count_tokens(body: CountRequest, service: TheService, tenant: Tenant) -> Response:
    """How many tokens the prompt of a conversation has, exactly."""
    async with service.manager.use(body.model) as model:
        ask = await asyncio.to_thread(count_ask, body, model, tenant)
        prompt = await asyncio.to_thread(chat_prompt, model, ask)
    return json_response({"input_tokens": len(prompt.ids)})


async def _events(body: MessagesRequest, service: Service, tenant: str) -> AsyncGenerator[Event, None]:
    async with service.manager.use(body.model) as model:
        ask = await asyncio.to_thread(messages_ask, body, model, tenant)
        prompt, pieces = await asyncio.to_thread(chat_pieces, model, ask)
        answer = MessageEvents(body.model, len(prompt.ids), body.stop_sequences or ())
        async with pieces:
            for event in answer.start():
                yield event
            async for piece in pieces:
                for event in answer.take(piece):
                    yield event


async def _lines(events: AsyncGenerator[Event, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(events):
        async for event in events:
            yield sse(to_json(event), event["type"])


async def _whole(events: AsyncGenerator[Event, None]) -> Response:
    return json_response(whole_message([event async for event in events]))


def _error_event(error: PunaError) -> bytes:
    return sse(to_json(error_content("/v1/messages", error)), "error")
