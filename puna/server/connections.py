"""Connections whose client does not read what it asked for: they must not keep their place for ever."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

STALLED_SECONDS = 60.0  # in which not one byte of what waits to be sent was taken


class EndStalled(asyncio.Protocol):
    """Goes before an HTTP protocol of uvicorn. A client that reads slowly is waited for; one that does not read at all
    is cut off, and its requests are cancelled as those of any client that goes away.
    """

    transport: Any = None  # uvicorn sets it
    _alarm: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        """The buffer is full: what was written is not taken."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        self._relax()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._relax()
        super().connection_lost(exc)

    def _watch(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._alarm = asyncio.get_running_loop().call_later(STALLED_SECONDS, self._look, size)

    def _look(self, size: int) -> None:
        if self.transport.get_write_buffer_size() < size:
            self._watch()
        else:
            self.transport.abort()

    def _relax(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None


HttpProtocol: type[asyncio.Protocol] = type("HttpProtocol", (EndStalled, AutoHTTPProtocol), {})
