"""Whether the server lives, whether it can take requests, and what it has done."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

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


@router.get("/metrics")
async def metrics(service: TheService) -> Response:
    """For Prometheus."""
    return Response(service.accounting.metrics.text(), media_type=CONTENT_TYPE_LATEST)
