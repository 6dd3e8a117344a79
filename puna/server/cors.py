"""What web pages may do: those of allowed origins may call this server, no other one may, not even by a trick.

A page can send requests to 127.0.0.1, and with DNS rebinding its own name can come to mean 127.0.0.1. The first kind
has a foreign ``Origin``, the second a foreign ``Host``; both are refused where no key protects the server.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from puna.server.http_errors import refuse
from puna.server.keys import Keys

# Pages and programs of this machine, as ollama allows them.
LOCAL_ORIGINS = (
    *(f"{scheme}://{host}{port}" for scheme in ("http", "https") for port in ("", ":*")
      for host in ("localhost", "127.0.0.1", "[::1]", "0.0.0.0")),
    "app://*",
    "file://*",
    "tauri://*",
    "vscode-webview://*",
    "vscode-file://*",
)  # fmt: skip
_LOCAL_ENDINGS = (".localhost", ".local", ".internal")
_METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_EXPOSED = "X-Request-Id, Retry-After"
_PREFLIGHT_SECONDS = "43200"


class Origins:
    """Refuses web pages of other origins; tells browsers what allowed ones may do (CORS, of the Fetch standard).

    ``origins`` may have ``*`` for any characters; on its own it allows all. ``local`` says that the server listens on
    this machine only, so that its ``Host`` must be this machine unless a key protects it.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], local: bool, keys: Keys) -> None:
        self.app = app
        self._any = "*" in origins
        allowed = [*LOCAL_ORIGINS, *(origin.rstrip("/") for origin in origins)]
        self._allowed = re.compile("|".join(re.escape(o.lower()).replace(r"\*", "[^/]*") for o in allowed))
        self._hosts = {urlsplit(origin).hostname for origin in origins} | {"localhost", socket.gethostname().lower()}
        self._local = local
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._local and not (self._any or self._keys.required or self._is_ours(host)):
            message = f"requests for the host {host} are not for this server; allow it with --origins http://{host}"
            return await refuse(scope, receive, send, 403, message)
        if origin is None:
            return await self.app(scope, receive, send)
        if not self._allows(origin, host):
            message = f"pages of {origin} may not call this server; allow them with --origins {origin}"
            return await refuse(scope, receive, send, 403, message)
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            preflight = {
                "Access-Control-Allow-Methods": _METHODS,
                "Access-Control-Allow-Headers": headers.get("access-control-request-headers", "*"),
                "Access-Control-Max-Age": _PREFLIGHT_SECONDS,
                "Vary": "Access-Control-Request-Headers",
            }
            response = Response(status_code=204, headers=preflight)
            return await response(scope, receive, self._with_origin(send, origin))
        return await self.app(scope, receive, self._with_origin(send, origin))

    def _allows(self, origin: str, host: str) -> bool:
        if self._any or self._allowed.fullmatch(origin.lower()):
            return True
        # A page of this very server, such as /docs. A rebound name looks the same, so it needs a key or our name.
        same = origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")
        return same and (self._keys.required or self._is_ours(host))

    def _is_ours(self, host: str) -> bool:
        """Whether a Host header is one that no attacker's DNS answers for: an address, or a local name."""
        name = _host_name(host)
        if not name or name in self._hosts or name.endswith(_LOCAL_ENDINGS):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _with_origin(self, send: Send, origin: str) -> Send:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Access-Control-Allow-Origin"] = origin
                headers["Access-Control-Expose-Headers"] = _EXPOSED
                headers.add_vary_header("Origin")
            await send(message)

        return sending


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(host: str) -> str:
    """The name or address of a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.lower().partition(":")[0].rstrip(".")
