"""A web server on this machine that misbehaves as a test asks it to, and remembers what it was asked."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[BaseHTTPRequestHandler], None]


class LocalServer:
    """``routes[path]`` lists the replies to successive requests; the last goes on. ``requests``: (path, headers)."""

    def __init__(self) -> None:
        self.routes: dict[str, list[Reply]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                server.requests.append((path, {k.lower(): v for k, v in self.headers.items()}))
                replies = server.routes.get(path)
                if not replies:
                    refuse(404)(self)
                else:
                    (replies.pop(0) if len(replies) > 1 else replies[0])(self)

            def end_headers(self) -> None:
                self.send_header("Connection", "close")
                super().end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def ranges(self, path: str) -> list[str | None]:
        """The Range header of each request for ``path``."""
        return [headers.get("range") for asked, headers in self.requests if asked == path]


def serve(
    data: bytes,
    *,
    etag: str | None = None,
    ranges: bool = True,
    stop_after: int | None = None,
    claim: int | None = None,
    piece: int = 1 << 16,
    before: dict[int, Callable[[], object]] | None = None,
) -> Reply:
    """A file. ``stop_after`` bytes of a body the connection breaks; ``claim`` replaces the true Content-Length.

    ``before[n]`` is called when n bytes of the body have been sent.
    """

    def reply(handler: BaseHTTPRequestHandler) -> None:
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        same_version = handler.headers.get("If-Range") in (None, etag)
        if asked and ranges and same_version:
            start = int(asked[1])
            if start >= len(data):
                return refuse(416)(handler)
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            handler.send_response(200)
        body = data[start:]
        handler.send_header("Content-Length", str(len(body) if claim is None else claim))
        if etag:
            handler.send_header("ETag", etag)
        handler.end_headers()
        end = len(body) if stop_after is None else min(stop_after, len(body))
        sent = 0
        while sent < end:
            if before and sent in before:
                before[sent]()
            step = min(piece, end - sent)
            handler.wfile.write(body[sent : sent + step])
            handler.wfile.flush()
            sent += step
        return None

    return reply


def chunked(data: bytes) -> Reply:
    """A body of unknown length."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))

    return reply


def refuse(status: int, **headers: str) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return reply


def redirect(address: str) -> Reply:
    return refuse(302, Location=address)


def wrong_range(data: bytes) -> Reply:
    """Always the first byte's range, whatever was asked for."""

    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return reply


def as_json(value: Any) -> Reply:
    return serve(json.dumps(value).encode())
