"""How errors become HTTP: one status per kind, in the shape that each API's clients expect."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from puna.errors import AccessError, CapacityError, PunaError, RequestError, SourceError, StoreError, TemplateError

STATUS: list[tuple[type[PunaError], int]] = [
    (CapacityError, 503),
    (AccessError, 401),
    (RequestError, 400),
    (TemplateError, 400),
    (StoreError, 404),
    (SourceError, 502),
    (PunaError, 500),
]
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
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


def error_body(path: str, status: int, message: str) -> dict[str, object]:
    """The JSON of an error as the API that owns ``path`` has it."""
    if path.startswith("/v1/messages"):
        kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    if path.startswith("/v1/") or path in ("/tokenize", "/detokenize"):
        kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return {"error": message}


def error_response(path: str, error: PunaError) -> JSONResponse:
    """The whole response to an error that a route raised."""
    retry = getattr(error, "retry_after", None)
    headers = {} if retry is None else {"Retry-After": str(max(1, math.ceil(retry)))}
    status = status_of(error)
    return JSONResponse(error_body(path, status, str(error)), status, headers)


async def refuse(
    scope: Scope, receive: Receive, send: Send, status: int, message: str, headers: Mapping[str, str] | None = None
) -> None:
    """Answer a request before any route sees it."""
    response = JSONResponse(error_body(scope["path"], status, message), status, headers)
    await response(scope, receive, send)


def install_error_handlers(app: FastAPI) -> None:
    """Errors of Puna, of validation and of routing, each in the shape of its API."""

    @app.exception_handler(PunaError)
    async def puna_error(request: Request, error: PunaError) -> JSONResponse:
        return error_response(request.url.path, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(error_body(request.url.path, 400, _first_problem(error)), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_body(request.url.path, error.status_code, message), error.status_code, error.headers)

    @app.exception_handler(MemoryError)
    async def no_memory(request: Request, error: MemoryError) -> JSONResponse:
        return error_response(request.url.path, CapacityError("the machine is out of memory", 5.0))

    @app.exception_handler(RecursionError)
    async def too_deep(request: Request, error: RecursionError) -> JSONResponse:
        return error_response(request.url.path, RequestError("the body is nested too deeply"))


def _first_problem(error: RequestValidationError) -> str:
    """One sentence of pydantic's report: the field and what is wrong with it."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if part != "body"]
    more = f" (and {len(error.errors()) - 1} more problems)" if len(error.errors()) > 1 else ""
    if problem["type"] == "json_invalid":
        return f"the body is not JSON: {problem['ctx']['error']} at character {place[-1]}"
    if problem["type"] == "extra_forbidden":
        return f"the field {'.'.join(place)} is not known here; remove it{more}"
    if problem["type"] == "missing" and place:
        return f"the field {'.'.join(place)} is missing{more}"
    found = repr(problem.get("input"))
    found = found if len(found) <= 80 else found[:77] + "..."
    where = f"the field {'.'.join(place)}" if place else "the body"
    return f"{where}: {problem['msg'][:1].lower()}{problem['msg'][1:]}, found {found}{more}"
