"""Streams of events, and clients that go away, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

import pytest

from puna.server import sending
from puna.server.anthropic.routes import PING as ANTHROPIC_PING
from puna.server.sending import PING, EventStream, until_disconnected

SCOPE: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}}


async def never() -> MutableMapping[str, Any]:
    """A client that stays."""
    await asyncio.Event().wait()
    raise AssertionError


@pytest.mark.parametrize("ping", [PING, ANTHROPIC_PING])
def test_a_silent_stream_shows_that_it_is_alive(ping: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "PING_SECONDS", 0.001)

    async def run() -> list[bytes]:
        pinged = asyncio.Event()
        sent: list[bytes] = []

        async def events() -> AsyncGenerator[bytes, None]:
            yield b"first"
            await pinged.wait()
            yield b"last"

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message.get("body", b""))
            if message.get("body") == ping:
                pinged.set()

        stream = await EventStream.start(events(), lambda error: b"", ping)
        assert sent == []
        await asyncio.wait_for(stream(SCOPE, never, send), 60)
        return sent

    sent = asyncio.run(run())
    assert sent[:3] == [b"", b"first", ping]
    assert [part for part in sent if part not in (b"", ping)] == [b"first", b"last"]
    assert sent[-1] == b""


def test_no_ping_while_something_is_being_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads slowly gets no more than it can take."""
    monkeypatch.setattr(sending, "PING_SECONDS", 0.0)

    async def run() -> list[bytes]:
        sent: list[bytes] = []

        async def events() -> AsyncGenerator[bytes, None]:
            yield b"only"

        sending = False

        async def send(message: MutableMapping[str, Any]) -> None:
            nonlocal sending
            assert not sending
            sending = True
            for _ in range(20):
                await asyncio.sleep(0)
            sending = False
            sent.append(message.get("body", b""))

        stream = await EventStream.start(events(), lambda error: b"")
        await asyncio.wait_for(stream(SCOPE, never, send), 60)
        return sent

    assert [part for part in asyncio.run(run()) if part != PING] == [b"", b"only", b""]


def test_a_stream_that_fails_ends_with_an_error_and_not_in_the_middle() -> None:
    async def run() -> list[bytes]:
        sent: list[bytes] = []

        async def events() -> AsyncGenerator[bytes, None]:
            yield b"first"
            raise ZeroDivisionError("a secret")

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message.get("body", b""))

        await (await EventStream.start(events(), lambda error: str(error).encode()))(SCOPE, never, send)
        return sent

    assert asyncio.run(run()) == [b"", b"first", b"the server failed: ZeroDivisionError", b""]


def test_work_ends_with_its_client() -> None:
    async def run() -> bool:
        started, ended = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        async def leave() -> MutableMapping[str, Any]:
            await started.wait()
            return {"type": "http.disconnect"}

        task = await until_disconnected(leave, work())
        return task.cancelled() and ended.is_set()

    assert asyncio.run(run())
