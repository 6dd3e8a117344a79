"""One line of JSON for each request, and for whatever else happens. What users write is in it only if asked for."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TextIO
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puna.engine import Timings
from puna.server.http_errors import refuse
from puna.server.metrics import ServerMetrics
from puna.server.policy import UPLOADS

logger = logging.getLogger("puna.server")
_QUIET = ("/livez", "/readyz", "/health", "/metrics")
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LOGGED_BYTES = 1 << 16


@dataclass
class RequestRecord:
    """What becomes known of an HTTP request on its way through the server."""

    id: str
    model: str | None = None
    tokens: dict[str, int] = field(default_factory=dict)
    finish_reasons: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, timings: Timings, generated: int, reason: str) -> None:
        """An answer of this request has ended; a request may have several."""
        counts = {"prompt": timings.prompt_tokens, "cached": timings.cached_tokens, "generated": generated}
        for name, count in counts.items():
            self.tokens[name] = self.tokens.get(name, 0) + count
        self.finish_reasons.append(reason)
        for name in ("queue", "prefill", "decode"):
            self.seconds[name] = round(max(self.seconds.get(name, 0.0), getattr(timings, f"{name}_seconds")), 4)


# The request that this task works for: how a layer that knows nothing of HTTP adds to its log line.
current_request: ContextVar[RequestRecord | None] = ContextVar("current_request", default=None)


class RequestLog:
    """The outermost layer: gives each request an id, counts and logs it, and answers for a route that failed."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, with_bodies: bool = False) -> None:
        """``with_bodies`` logs what was sent and answered too, up to 64 KiB of each."""
        self.app = app
        self.metrics = metrics
        self.with_bodies = with_bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        record = RequestRecord(given if _ID.fullmatch(given) else uuid4().hex)
        started = time.perf_counter()
        status = 0
        sent, answered = bytearray(), bytearray()
        disconnected = complete = False
        keep_bodies = self.with_bodies and not scope["path"].startswith(tuple(UPLOADS))

        async def receiving() -> Message:
            nonlocal disconnected
            message = await receive()
            disconnected = disconnected or (message["type"] == "http.disconnect" and not complete)
            if keep_bodies:
                sent.extend(message.get("body", b"")[: _LOGGED_BYTES - len(sent)])
            return message

        async def sending(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = record.id
                if scope["path"].startswith("/v1/messages"):
                    headers["request-id"] = record.id  # where Anthropic's clients look for it
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
                if keep_bodies:
                    answered.extend(message.get("body", b"")[: _LOGGED_BYTES - len(answered)])
            await send(message)

        token = current_request.set(record)
        failure: str | None = None
        try:
            await self.app(scope, receiving, sending)
        except Exception:
            failure = traceback.format_exc()
            if not status:
                await refuse(scope, receive, sending, 500, f"the server failed; its log tells why, request {record.id}")
        finally:
            current_request.reset(token)
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.http.labels(method, route, str(status or 499)).inc()
            if failure or status >= 400 or scope["path"] not in _QUIET:
                facts: dict[str, Any] = {
                    "request_id": record.id,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status or 499,
                    "seconds": round(time.perf_counter() - started, 4),
                    "tenant": scope.get("state", {}).get("tenant") or None,
                    "client": (scope.get("client") or [None])[0],
                    "model": record.model,
                    "tokens": record.tokens,
                    "finish_reasons": record.finish_reasons,
                    **{f"{name}_seconds": seconds for name, seconds in record.seconds.items()},
                    "disconnected": disconnected or None,
                    "failure": failure,
                }
                if keep_bodies:
                    facts |= {"body": sent.decode("utf-8", "replace"), "answer": answered.decode("utf-8", "replace")}
                level = logging.ERROR if failure else logging.INFO
                logger.log(
                    level, "request", extra={"facts": {k: v for k, v in facts.items() if v not in (None, {}, [])}}
                )


class JsonFormatter(logging.Formatter):
    """A record as one line: time, level, event, and the facts that came with it."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        if record.name != logger.name:
            line["logger"] = record.name
        if record.exc_info:
            line["failure"] = self.formatException(record.exc_info)
        return json.dumps(line | getattr(record, "facts", {}), ensure_ascii=False, default=str)


def configure_logs(stream: TextIO | None = None) -> None:
    """Send all of this process's log to ``stream`` (standard error) as lines of JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.INFO)
