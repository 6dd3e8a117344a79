"""How errors become HTTP: one status per kind, in the shape that each API's clients expect."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from puna.errors import (
    AccessError,
    CapacityError,
    ContextError,
    NotFoundError,
    PunaError,
    RequestError,
    SourceError,
    StoreError,
    TemplateError,
)
from puna.server.sending import json_response


class FieldError(RequestError):
    """A field of a request's body can't be honoured. ``param`` is its name."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


STATUS: list[tuple[type[PunaError], int]] = [
    (CapacityError, 503),
    (AccessError, 401),
    (RequestError, 400),
    (TemplateError, 400),
    (NotFoundError, 404),
    (StoreError, 404),
    (SourceError, 502),
    (PunaError, 500),
]
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_TYPE_NAMES = ("str", "int", "float", "bool")
_OPENAI_CODES = [(ContextError, "context_length_exceeded"), (StoreError, "model_not_found")]
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    529: "overloaded_error",
}


def status_of(error: PunaError) -> int:
    if isinstance(error, StoreError) and isinstance(error.__cause__, OSError):
        return 507 if error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT) else 500  # the disk, not the request
    return next(status for kind, status in STATUS if isinstance(error, kind))


def error_body(
    path: str, status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, object]:
    """The JSON of an error as the API that owns ``path`` has it."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    if path.startswith("/v1/") or path in ("/tokenize", "/detokenize"):
        kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return {"error": message}


def error_response(path: str, error: PunaError) -> Response:
    """The whole response to an error that a route raised."""
    retry = getattr(error, "retry_after", None)
    headers = {} if retry is None else {"Retry-After": str(max(1, math.ceil(retry)))}
    return json_response(error_content(path, error), status_of(error), headers)


def error_content(path: str, error: PunaError) -> dict[str, object]:
    """The JSON of an error that a route raised."""
    param = error.param if isinstance(error, FieldError) else None
    code = next((code for kind, code in _OPENAI_CODES if isinstance(error, kind)), None)
    return error_body(path, status_of(error), str(error), param, code)


async def refuse(
    scope: Scope, receive: Receive, send: Send, status: int, message: str, headers: Mapping[str, str] | None = None
) -> None:
    """Answer a request before any route sees it."""
    response = json_response(error_body(scope["path"], status, message), status, headers)
    await response(scope, receive, send)


def install_error_handlers(app: FastAPI) -> None:
    """Errors of Puna, of validation and of routing, each in the shape of its API."""

    @app.exception_handler(PunaError)
    async def puna_error(request: Request, error: PunaError) -> Response:
        return error_response(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        problem = _worst(error.errors())
        return json_response(error_body(request.url.path, 400, _explain(problem), _place(problem) or None), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return json_response(error_body(request.url.path, error.status_code, message), error.status_code, error.headers)

    @app.exception_handler(MemoryError)
    async def no_memory(request: Request, error: MemoryError) -> Response:
        return error_response(request.url.path, CapacityError("the machine is out of memory", 5.0))

    @app.exception_handler(RecursionError)
    async def too_deep(request: Request, error: RecursionError) -> Response:
        return error_response(request.url.path, RequestError("the body is nested too deeply"))


def problem_of(error: ValidationError) -> str:
    """One sentence: what is wrong with a body that came another way than in a request of its own."""
    return _explain(_worst([{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]))


def _worst(problems: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The problem to tell: of the first field that has one, the one that is no matter of types, as an alternative of a
    union is that was not meant, and the deepest."""
    first = problems[0]["loc"][:2]
    return max(
        (problem for problem in problems if problem["loc"][:2] == first),
        key=lambda problem: (not problem["type"].endswith("_type"), len(problem["loc"])),
    )


def _place(problem: Mapping[str, Any]) -> str:
    """Where in the body a problem is, without pydantic's names of alternatives; empty for the body itself."""
    if problem["type"] == "json_invalid":
        return ""
    *path, last = problem["loc"][1:] or ("",)
    parts = [part for part in path if _is_field(part)]
    if problem["type"] == "extra_forbidden" or _is_field(last):
        parts.append(last)
    return ".".join(map(str, parts))


def _is_field(part: str | int) -> bool:
    return isinstance(part, int) or (part.isidentifier() and part.islower() and part not in _TYPE_NAMES)


def _explain(problem: Mapping[str, Any]) -> str:
    """One sentence: the field and what is wrong with it."""
    place = _place(problem)
    if problem["type"] == "extra_forbidden":
        return f"the field {place} is not known here; remove it"
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']} at character {problem['loc'][-1]}"
    if problem["type"] == "missing" and place:
        return f"the field {place} is missing"
    found = repr(problem.get("input"))
    found = found if len(found) <= 80 else found[:77] + "..."
    where = f"the field {place}" if place else "the body"
    return f"{where}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, found {found}"
