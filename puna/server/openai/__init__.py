"""OpenAI's API, and vLLM's additions to it."""

from fastapi import APIRouter

from puna.server.openai import (
    adapters,
    batches,
    chat,
    completions,
    embeddings,
    files,
    models,
    moderations,
    responses,
    tokens,
)

router = APIRouter()
for part in (models, chat, completions, embeddings, tokens, responses, moderations, files, batches, adapters):
    router.include_router(part.router)
