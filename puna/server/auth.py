"""Who a request is from: its key becomes a tenant and the scopes that it has."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from puna.server.http_errors import refuse
from puna.server.keys import Key, Keys
from puna.server.policy import policy_of

_MISSING = "this server needs a key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"


class Auth:
    """Lets in requests that have the key they need; ``scope["state"]`` then has the ``tenant``, "" without keys."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        policy = policy_of(scope["method"], scope["path"])
        key: Key | None = None
        if self.keys.required:
            secrets = _secrets(scope)
            key = next(filter(None, map(self.keys.find, secrets)), None)
            if key is None and policy != "open":
                message = "the key is not one of this server's" if secrets else _MISSING
                return await refuse(scope, receive, send, 401, message, {"WWW-Authenticate": "Bearer"})
            if key is not None and policy == "admin" and key.scope != "admin":
                message = f"the key {key.name} may use models, but this needs a key of the scope admin"
                return await refuse(scope, receive, send, 403, message)
        scope.setdefault("state", {})["tenant"] = "" if key is None else key.name
        return await self.app(scope, receive, send)


def tenant_of(request: Request) -> str:
    """Whom a request is for: what ``Ask.tenant`` is."""
    tenant: str = request.state.tenant
    return tenant


# The type of a route's parameter that is filled with it.
Tenant = Annotated[str, Depends(tenant_of)]


def _secrets(scope: Scope) -> list[bytes]:
    """The keys that a request has: a bearer token as OpenAI and ollama have it, Anthropic's x-api-key, or both."""
    found = []
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            found.append(value.strip())
        elif name == b"authorization":
            kind, _, token = value.partition(b" ")
            if kind.lower() == b"bearer":
                found.append(token.strip())
    return [secret for secret in found if secret]
