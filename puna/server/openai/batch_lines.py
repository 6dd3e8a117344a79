"""The lines of a batch's input: which requests they may be, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi.responses import Response
from pydantic import ValidationError

from puna.errors import RequestError
from puna.server.http_errors import problem_of
from puna.server.openai import chat, completions, embeddings, moderations, responses
from puna.server.openai.fields import Body
from puna.server.openai.response_fields import ResponseBody
from puna.server.service import Service

MAX_LINES = 50_000  # as OpenAI bounds them
MAX_ERRORS = 100
_LINE_FIELDS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True)
class Endpoint:
    """A route that batches can use. ``run`` takes the tenant, and whose share of the machine the work counts to."""

    body: type[Body]
    run: Callable[[Service, Any, str, str], Awaitable[Response]]


ENDPOINTS = {
    "/v1/chat/completions": Endpoint(chat.ChatBody, lambda s, body, _tenant, share: chat.complete_chat(s, body, share)),
    "/v1/completions": Endpoint(
        completions.CompletionBody, lambda s, body, _tenant, share: completions.complete_text(s, body, share)
    ),
    "/v1/embeddings": Endpoint(
        embeddings.EmbeddingBody, lambda s, body, _tenant, share: embeddings.embed_texts(s, body, share)
    ),
    "/v1/responses": Endpoint(ResponseBody, responses.respond),
    "/v1/moderations": Endpoint(
        moderations.ModerationBody, lambda s, body, _tenant, share: moderations.moderate(s, body, share)
    ),
}


@dataclass(frozen=True)
class Line:
    """One request of a batch."""

    custom_id: str
    body: Any


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, counted from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def read_line(raw: bytes, endpoint: str) -> Line:
    """Check a line. Raises RequestError saying what is wrong with it."""
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        raise RequestError("the line is not JSON") from None
    if not isinstance(line, dict):
        raise RequestError("the line is not a JSON object")
    unknown = sorted(line.keys() - _LINE_FIELDS)
    if unknown:
        raise RequestError(f"the field {unknown[0]} is not known here; remove it")
    custom_id = line.get("custom_id")
    if not (isinstance(custom_id, str) and custom_id):
        raise RequestError(f"custom_id must be a text of at least one character, found {_shown(custom_id)}")
    if line.get("method", "POST") != "POST":
        raise RequestError(f"method must be POST, found {_shown(line['method'])}")
    if line.get("url") != endpoint:
        raise RequestError(f"url must be {endpoint}, the batch's endpoint, found {_shown(line.get('url'))}")
    try:
        body = ENDPOINTS[endpoint].body.model_validate(line.get("body"))
    except ValidationError as error:
        raise RequestError(f"body: {problem_of(error)}") from None
    if getattr(body, "stream", None):
        raise RequestError("body: stream must be false; a batch has whole answers")
    return Line(custom_id, body)


def check_lines(path: Path, endpoint: str) -> tuple[int, list[dict[str, Any]]]:
    """How many requests there are, and the first problems with them, as a batch's ``errors`` have them."""
    seen: set[str] = set()
    errors: list[dict[str, Any]] = []
    total = 0
    for number, raw in numbered_lines(path):
        total += 1
        try:
            line = read_line(raw, endpoint)
            if line.custom_id in seen:
                raise RequestError(f"custom_id {_shown(line.custom_id)} was used before; each must be another")
            seen.add(line.custom_id)
        except RequestError as error:
            errors.append({"code": "invalid_request", "message": str(error), "param": None, "line": number})
        if total > MAX_LINES:
            errors.append(_whole("too_many_requests", f"the file has more than {MAX_LINES} requests; split it"))
        if total > MAX_LINES or len(errors) == MAX_ERRORS:
            break
    if not total:
        errors.append(_whole("empty_file", "the file has no requests"))
    return total, errors


def _whole(code: str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None, "line": None}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
