"""From settings to a process that listens, and that ends without dropping what it has begun."""

from __future__ import annotations

import errno
import math
import socket
import ssl
import time
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from puna.errors import RequestError
from puna.server.connections import HttpProtocol
from puna.server.cors import is_loopback
from puna.server.keys import KeyFile
from puna.server.service import Service
from puna.server.settings import ServerSettings
from puna.store import Store

DRAIN_SECONDS = 30.0
CLOSE_SECONDS = 5
KEEP_ALIVE_SECONDS = 75  # of idle connections: longer than clients keep them, so that none is closed as it is used


def check_settings(settings: ServerSettings, store: Store) -> None:
    """Raise RequestError for what must not or cannot be served, StoreError for keys that can't be read."""
    protected = settings.api_keys or KeyFile(store).read()
    if not (protected or settings.insecure or is_loopback(settings.host)):
        raise RequestError(
            f"refusing to listen on {settings.host} without a key: anyone who reaches it could use it. Make one with "
            "`puna keys add NAME`, or give --insecure when the network itself is trusted"
        )
    if settings.tls_cert is None and settings.tls_key is not None:
        raise RequestError("--tls-key needs --tls-cert, the certificate that it belongs to")
    if settings.tls_cert is not None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(settings.tls_cert, settings.tls_key, password=_no_password)
        except OSError as error:  # ssl.SSLError is one
            files = " and ".join(str(path) for path in (settings.tls_cert, settings.tls_key) if path is not None)
            reason = getattr(error, "reason", None) or error.strerror or error
            raise RequestError(f"{files} must be a certificate and its key in PEM form: {reason}") from None


def listen(settings: ServerSettings) -> socket.socket:
    """The socket to serve on. Raises RequestError when the address can't be had."""
    host, port = settings.host, settings.port
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        if isinstance(error, socket.gaierror):
            raise RequestError(f"--host {host} is no address of this machine: {error.strerror}") from None
        if error.errno == errno.EADDRINUSE:
            raise RequestError(
                f"port {port} of {host} is in use, perhaps by another Puna or by ollama; stop that, or choose another "
                "with --port"
            ) from None
        raise RequestError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None


class Server(uvicorn.Server):
    """Ends in two steps. At the first signal, requests that run may finish, and new ones are refused with 503; at the
    end of their time, or at a second signal, what still runs is cancelled.
    """

    def __init__(self, app: FastAPI, settings: ServerSettings) -> None:
        config = uvicorn.Config(
            app,
            http=HttpProtocol,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            log_config=None,
            access_log=False,
            ws="none",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        super().__init__(config)
        self._app = app
        self._deadline: float | None = None

    @property
    def _service(self) -> Service:
        service: Service = self._app.state.service
        return service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal of the operating system, in the event loop's thread, between any two instructions."""
        if not self.started:
            super().handle_exit(sig, frame)
        elif self._deadline is None:
            self._deadline = time.monotonic() + DRAIN_SECONDS
            self._service.accounting.limits.draining = True
        else:
            self._deadline = 0.0

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second: whether to close now."""
        if self._deadline is not None:
            if not self.server_state.tasks:
                self.should_exit = True
            elif time.monotonic() >= self._deadline:
                # Streams then end as cancelled ones do, instead of breaking off.
                self._service.engine_thread.cancel_all()
                self.should_exit = True
        return await super().on_tick(counter)


def describe(settings: ServerSettings) -> dict[str, Any]:
    """What is worth knowing of the settings when a server starts: no key is in it."""
    names = ("max_queue", "max_loaded", "keep_alive", "context_length", "parallel", "threads", "kv_type")
    facts = {name: getattr(settings, name) for name in (*names, "memory_budget", "log_requests", "insecure")}
    if math.isinf(settings.keep_alive):
        facts["keep_alive"] = "for ever"
    return {"url": settings.url, **{name: value for name, value in facts.items() if value is not None}}


def _no_password() -> str:
    raise OSError("the key is encrypted; give one without a password")
