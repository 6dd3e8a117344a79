"""A server with a route of its own that generates, so that its guards are tested whatever the APIs do."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Body, FastAPI
from fastapi.responses import StreamingResponse
from running_server import RunningServer

from puna.engine import SamplingParams
from puna.server.asking import Ask, text_pieces
from puna.server.auth import Tenant
from puna.server.service import TheService
from puna.store import Store

router = APIRouter()


@router.post("/api/generate")
async def generate(service: TheService, tenant: Tenant, body: dict[str, Any] = Body()) -> StreamingResponse:  # noqa: B008
    """NDJSON with a line for each piece. ``max_tokens`` of null: until the context is full."""
    params = SamplingParams(temperature=0, max_tokens=body.get("max_tokens", 8), ignore_eos=True)
    lease = service.manager.use("stories")
    model = await lease.__aenter__()
    try:
        ids = model.llm.tokenizer.encode(body.get("prompt", "Once"), add_bos=True)
        pieces = text_pieces(model, ids, Ask(params, tenant=tenant))
        await pieces.__aenter__()
    except BaseException:
        await lease.__aexit__(None, None, None)
        raise

    async def lines() -> AsyncIterator[str]:
        try:
            async for piece in pieces:
                yield json.dumps({"text": piece.text, "end": piece.finish_reason}) + "\n"
        finally:
            await pieces.__aexit__(None, None, None)
            await lease.__aexit__(None, None, None)

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@router.post("/api/show")
async def echo(tenant: Tenant, body: Any = Body()) -> dict[str, Any]:  # noqa: B008
    if body == "fail":
        raise ZeroDivisionError("secret detail")
    return {"tenant": tenant, "length": len(str(body))}


@router.post("/api/pull")
async def manage() -> dict[str, str]:
    return {"status": "done"}


def add_routes(app: FastAPI) -> None:
    """Put the routes of this file before the server's own."""
    before = len(app.router.routes)
    app.include_router(router)
    app.router.routes[:0] = [app.router.routes.pop() for _ in range(len(app.router.routes) - before)]


class GuardedServer(RunningServer):
    """Serves ``stories`` through the routes of this file."""

    def __init__(self, store: Store, **settings: object) -> None:
        super().__init__(store, **settings)
        add_routes(self.app)
