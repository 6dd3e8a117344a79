"""POST /api/chat: the next message of a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from puna.server.asking import ChatAsk, chat_pieces
from puna.server.ollama.answering import Call, ask_of, joined, load_or_unload, piece_lines, think_of
from puna.server.ollama.bodies import ChatBody, JsonRoute
from puna.server.ollama.streaming import Answer, Line
from puna.server.service import TheService

router = APIRouter(route_class=JsonRoute)


@router.post("/api/chat", summary="Answer a conversation")
async def chat(body: ChatBody, service: TheService, request: Request) -> Response:
    """The next message, as JSON lines or (`stream` false) one object. No messages load the model.

    Where the last message is the assistant's, the model goes on with it.
    """
    call = Call.of(service, body, request)
    if not body.messages:
        return JSONResponse(await load_or_unload(call, {"message": {"role": "assistant", "content": ""}}))
    return Answer(_lines(call, body), _whole if body.stream is False else None)


async def _lines(call: Call, body: ChatBody) -> AsyncGenerator[Line, None]:
    messages = [message.plain() for message in body.messages or ()]
    last = messages[-1]
    async with call.use() as model:
        call.loaded()
        ask = ChatAsk(
            **vars(await ask_of(model, call, body)),
            messages=messages,
            tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            think=think_of(body, model.llm.template.source),
            continue_final_message=last["role"] == "assistant" and bool(last.get("content")),
        )
        _, pieces = await asyncio.to_thread(chat_pieces, model, ask)
        async with aclosing(piece_lines(call, model, body, pieces, _part, dict)) as lines:
            async for line in lines:
                yield line


def _part(content: str, thinking: str, calls: list[Line]) -> Line:
    message: Line = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    return {"message": message}


def _whole(lines: Sequence[Line]) -> Line:
    return joined(lines, lambda line: line["message"])
