"""OpenAI's API, and vLLM's additions to it."""

from fastapi import APIRouter

from puna.server.openai import adapters, chat, completions, embeddings, models, tokens

router = APIRouter()
for part in (models, chat, completions, embeddings, tokens, adapters):
    router.include_router(part.router)
