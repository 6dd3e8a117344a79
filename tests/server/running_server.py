"""A real server on a free port of this machine, for real clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

import httpx
import uvicorn

from puna.server.app import create_app
from puna.server.service import Service
from puna.server.settings import ServerSettings
from puna.store import Store


class RunningServer:
    """Serves a store until the block ends; ``url`` is where."""

    def __init__(self, store: Store, **settings: object) -> None:
        self.app = create_app(ServerSettings(port=0, **settings), store)  # type: ignore[arg-type]
        self.server = uvicorn.Server(uvicorn.Config(self.app, host="127.0.0.1", port=0, log_level="warning"))
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> RunningServer:
        self._thread.start()
        while not self.server.started:
            assert self._thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.should_exit = True
        self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "the server did not stop"

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service

    def until(self, condition: Callable[[Service], bool]) -> None:
        """Ask the server again and again, each time through its engine's thread, until the condition holds."""
        with httpx.Client(base_url=self.url, timeout=60) as http:
            for _ in range(20_000):
                if condition(self.service):
                    return
                assert http.get("/readyz").status_code == 200
        raise AssertionError("it never came to that")
