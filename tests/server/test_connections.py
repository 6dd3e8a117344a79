"""Clients that don't read."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
import uvicorn

from puna.server import connections
from puna.server.connections import EndStalled, HttpProtocol


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.01)

    async def run() -> None:
        left = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                left.set()

            watching = asyncio.ensure_future(watch())
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not left.is_set():
                await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
            await watching

        config = uvicorn.Config(app, http=HttpProtocol, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as client:
            serving = asyncio.ensure_future(server.serve([listening]))
            client.connect(listening.getsockname())
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.wait_for(left.wait(), 60)
            server.should_exit = True
            await serving

    asyncio.run(run())


class Transport:
    """With so many bytes to send at each look."""

    def __init__(self, *sizes: int) -> None:
        self._sizes = list(sizes)
        self.aborted = asyncio.Event()

    def get_write_buffer_size(self) -> int:
        return self._sizes.pop(0)

    def abort(self) -> None:
        assert not self._sizes
        self.aborted.set()


def test_one_that_reads_slowly_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.0)

    async def run() -> None:
        protocol = EndStalled()
        transport = protocol.transport = Transport(100, 99, 99, 50, 50, 50)
        protocol.pause_writing()
        await asyncio.wait_for(transport.aborted.wait(), 60)

    asyncio.run(run())


def test_one_that_reads_on_is_no_longer_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.0)

    async def run() -> bool:
        protocol = EndStalled()
        transport = protocol.transport = Transport(100, 100)
        protocol.pause_writing()
        protocol.resume_writing()
        for _ in range(5):
            await asyncio.sleep(0)
        return transport.aborted.is_set()

    assert not asyncio.run(run())
