"""Answers on their way out: JSON, server-sent events, and what happens when the client goes away."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from puna.errors import CapacityError, PunaError

_log = logging.getLogger(__name__)

Result = TypeVar("Result")
CLIENT_CLOSED_REQUEST = 499  # as nginx logs it; nobody is left to read it
PING_SECONDS = 10.0  # without an event, after which a stream shows that it is alive: proxies cut off silent ones
PING = b": ping\n\n"  # a comment, which clients skip


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
    """A response that is sent as it is made, with a ``ping`` whenever nothing came for long; made by ``start``."""

    def __init__(
        self, first: bytes, events: AsyncGenerator[bytes, None], on_error: Callable[[PunaError], bytes], ping: bytes
    ):
        self._events = events
        self._first = first
        self._on_error = on_error
        self._ping = ping
        super().__init__(self._body(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @classmethod
    async def start(
        cls, events: AsyncGenerator[bytes, None], on_error: Callable[[PunaError], bytes], ping: bytes = PING
    ) -> EventStream:
        """``on_error`` makes the last event of a stream that fails. Raises what ``events`` raises before its first.

        Once begun, ``events`` is always run to its end or closed, so what it holds is given back.
        """
        return cls(await anext(events), events, on_error, ping)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        last_sent = math.inf  # before the headers, when there is nothing to keep alive
        one_at_a_time = asyncio.Lock()

        async def sending(message: Message) -> None:
            nonlocal last_sent
            async with one_at_a_time:
                await send(message)
            last_sent = time.monotonic()

        async def pinging() -> None:
            while True:
                silent = max(0.0, time.monotonic() - last_sent)
                await asyncio.sleep(max(0.0, PING_SECONDS - silent))
                if time.monotonic() - last_sent >= PING_SECONDS and not one_at_a_time.locked():
                    await sending({"type": "http.response.body", "body": self._ping, "more_body": True})

        pings = asyncio.ensure_future(pinging())
        try:
            await super().__call__(scope, receive, sending)
        finally:
            pings.cancel()
            await asyncio.wait({pings})
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
        except Exception as error:
            _log.exception("an answer failed")
            yield self._on_error(PunaError(f"the server failed: {type(error).__name__}"))


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that ``work`` makes; ``work`` is cancelled when the client goes away before."""
    task = await until_disconnected(request.receive, work)
    return Response(status_code=CLIENT_CLOSED_REQUEST) if task.cancelled() else task.result()


async def until_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    """The task of ``work`` when it has ended: cancelled if the client went away before, or whoever waits here was."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.wait({task, gone})
    return task


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
