"""Another server that models are pulled from, which can stop in the middle of an answer."""

from __future__ import annotations

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Mirror:
    """Serves one file, with ranges. An answer stops halfway until ``gate`` is set; ``halfway`` tells that one has."""

    def __init__(self, content: bytes) -> None:
        self.ranges: list[str | None] = []  # what each request asked for
        self.gate = threading.Event()
        self.halfway = threading.Event()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers["Range"]
                mirror.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                self.send_response(206 if asked else 200)
                if asked:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.send_header("ETag", '"one"')
                self.end_headers()
                middle = max(start, len(content) // 2)
                with contextlib.suppress(OSError):  # of a client that is gone
                    self.wfile.write(content[start:middle])
                    mirror.halfway.set()
                    mirror.gate.wait(60)
                    self.wfile.write(content[middle:])

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/tales.gguf"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()
