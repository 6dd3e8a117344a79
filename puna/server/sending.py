"""Answers on their way out: JSON, server-sent events, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from puna.errors import CapacityError, PunaError

CLIENT_CLOSED_REQUEST = 499  # as nginx logs it; nobody is left to read it


def to_json(value: Any) -> bytes:
    """UTF-8; a lone surrogate, which UTF-8 can't hold, stays the escape that it came as."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def sse(data: bytes, event: str | None = None) -> bytes:
    """One server-sent event."""
    name = b"" if event is None else f"event: {event}\n".encode()
    return name + b"data: " + data + b"\n\n"


class EventStream(StreamingResponse):
    """A response that is sent as it is made; made by ``start``."""

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None], on_error: Callable[[PunaError], bytes]):
        self._events = events
        self._first = first
        self._on_error = on_error
        super().__init__(self._body(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @classmethod
    async def start(cls, events: AsyncGenerator[bytes, None], on_error: Callable[[PunaError], bytes]) -> EventStream:
        """``on_error`` makes the last event of a stream that fails. Raises what ``events`` raises before its first.

        Once begun, ``events`` is always run to its end or closed, so what it holds is given back.
        """
        return cls(await anext(events), events, on_error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()

    async def _body(self) -> AsyncIterator[bytes]:
        if self._first:
            yield self._first
        try:
            async for event in self._events:
                yield event
        except PunaError as error:
            yield self._on_error(error)
        except MemoryError:
            yield self._on_error(CapacityError("the machine is out of memory"))


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that ``work`` makes; ``work`` is cancelled when the client goes away before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
