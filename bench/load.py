"""Clients of a server: streaming completions over plain sockets, so that the clients cost next to nothing."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Answer:
    """When one request was sent, and when each piece of its answer came (``time.perf_counter``)."""

    sent: float
    pieces: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first piece."""
        return self.pieces[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in zip(self.pieces, self.pieces[1:], strict=False)]


async def complete(port: int, model: str, prompt: Sequence[int], tokens: int) -> Answer:
    """One streaming completion of a prompt of token ids. Raises RuntimeError for an answer that is none."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        answer = Answer(time.perf_counter())
        writer.write(head.encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read(2000)).decode(errors='replace')}")
        while line := await reader.readline():
            if line.startswith(b"data: {") and b'"choices":[]' not in line.replace(b" ", b""):
                answer.pieces.append(time.perf_counter())
        if not answer.pieces:
            raise RuntimeError("the answer has no pieces")
        return answer
    finally:
        writer.close()


async def run_clients(
    port: int, model: str, prompts: Sequence[Sequence[Sequence[int]]], tokens: int
) -> tuple[float, list[Answer]]:
    """Clients that each send their prompts one after the other; seconds for all of them, and every answer."""

    async def client(own: Sequence[Sequence[int]]) -> list[Answer]:
        return [await complete(port, model, prompt, tokens) for prompt in own]

    started = time.perf_counter()
    answers = await asyncio.gather(*map(client, prompts))
    return time.perf_counter() - started, [answer for own in answers for answer in own]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * len(ordered) * 1000) // 1000) - 1))]
