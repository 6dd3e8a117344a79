"""Whether the server lives, and whether it can take requests."""

from __future__ import annotations

from fastapi import APIRouter

from puna.server.service import TheService

router = APIRouter(tags=["health"])


@router.get("/livez")
@router.get("/health")
async def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def ready(service: TheService) -> dict[str, str]:
    """The engine's thread takes work: it answers between two steps."""
    await service.engine_thread.call(lambda: None)
    return {"status": "ok"}
