"""Answers as JSON lines, which end when their reader goes away."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from puna.errors import PunaError
from puna.server.sending import until_disconnected

Line = dict[str, Any]
# What becomes of the lines when the client wants a single object.
Fold = Callable[[Sequence[Line]], Line]

_log = logging.getLogger(__name__)


class Answer(Response):
    """The lines of an asynchronous generator: as they come, or folded into one object at the end.

    From the first moment on, while a model is loaded and a prompt is read too, a client that disconnects cancels the
    generator. An error before the first line is an HTTP error as any other; one after it is the last line.
    """

    def __init__(self, lines: AsyncGenerator[Line, None], fold: Fold | None = None) -> None:
        """Stream, unless there is a ``fold``."""
        super().__init__()
        self._lines = lines
        self._fold = fold

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = await until_disconnected(receive, self._answer(send))
        if not answering.cancelled():
            answering.result()

    async def _answer(self, send: Send) -> None:
        async with aclosing(self._lines) as lines:
            if self._fold is not None:
                body = encode(self._fold([line async for line in lines]))
                await send(_start(b"application/json", len(body)))
                await send({"type": "http.response.body", "body": body})
                return
            first = await anext(lines)
            await send(_start(b"application/x-ndjson"))
            await send({"type": "http.response.body", "body": encode(first), "more_body": True})
            try:
                async for line in lines:
                    await send({"type": "http.response.body", "body": encode(line), "more_body": True})
            except PunaError as error:
                await send({"type": "http.response.body", "body": encode({"error": str(error)}), "more_body": True})
            except Exception as error:
                _log.exception("an answer failed")
                text = f"the server failed: {type(error).__name__}"
                await send({"type": "http.response.body", "body": encode({"error": text}), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def encode(line: Line) -> bytes:
    """One line of JSON."""
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"


def _start(media_type: bytes, length: int | None = None) -> dict[str, Any]:
    headers = [(b"content-type", media_type)]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": 200, "headers": headers}
