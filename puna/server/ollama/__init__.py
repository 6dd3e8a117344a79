"""ollama's API. Every route, so that what was made for ollama works unchanged; docs/ollama-api.md has every field."""

from fastapi import APIRouter

from puna.server.ollama import blobs, chat, embed, generate, jobs, models

router = APIRouter(tags=["ollama"])
for part in (generate, chat, embed, models, jobs, blobs):
    router.include_router(part.router)

__all__ = ["router"]
