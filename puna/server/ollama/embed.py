"""POST /api/embed and /api/embeddings: vectors of texts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from starlette.responses import Response

from puna.errors import ContextError, RequestError
from puna.server.embedding import embed
from puna.server.manager import ServedModel
from puna.server.ollama.answering import Call
from puna.server.ollama.bodies import EmbedBody, EmbeddingsBody, JsonRoute, ModelUse
from puna.server.ollama.streaming import Answer, Line
from puna.server.service import TheService

router = APIRouter(route_class=JsonRoute)


@router.post("/api/embed", summary="Vectors of texts")
async def embed_texts(body: EmbedBody, service: TheService, request: Request) -> Response:
    """One vector of length 1 for each text: the mean of the final hidden states. No text loads the model."""
    call = Call.of(service, body, request)
    texts = body.input if isinstance(body.input, list) else [body.input] if body.input else []
    return Answer(_vectors(call, body, texts, body.dimensions), _embed_answer)


@router.post("/api/embeddings", summary="The vector of one text (older)", deprecated=True)
async def embed_prompt(body: EmbeddingsBody, service: TheService, request: Request) -> Response:
    """The same vector as /api/embed gives. No prompt loads the model."""
    call = Call.of(service, body, request)
    return Answer(_vectors(call, body, [body.prompt] if body.prompt else [], None), _embeddings_answer)


def _embed_answer(lines: Sequence[Line]) -> Line:
    return {"model": lines[-1]["model"], "embeddings": [line["vector"] for line in lines[:-1]], **lines[-1]}


def _embeddings_answer(lines: Sequence[Line]) -> Line:
    return {"embedding": lines[0]["vector"] if len(lines) > 1 else []}


async def _vectors(
    call: Call, body: ModelUse, texts: Sequence[str], dimensions: int | None
) -> AsyncGenerator[Line, None]:
    """A line for each vector, and one with the counts."""
    async with call.use() as model:
        call.loaded()
        prompts = [_ids(model, call, body, text) for text in texts]
        if dimensions is not None and dimensions > model.llm.config.hidden_size:
            raise RequestError(
                f"dimensions must be at most {model.llm.config.hidden_size}, the size of this model's vectors, "
                f"found {dimensions}"
            )
        for vector in await embed(model, prompts, tenant=call.tenant):
            yield {"vector": _cut(vector, dimensions).tolist()}
        yield {"model": body.model, **call.times(), "prompt_eval_count": sum(map(len, prompts))}


def _ids(model: ServedModel, call: Call, body: ModelUse, text: str) -> list[int]:
    """Raises RequestError for a text that is too long, unless it may be cut at its end."""
    tokenizer = model.llm.tokenizer
    ids = tokenizer.encode(text, add_bos=tokenizer.add_bos)
    limit = min(model.llm.context_length, call.options.num_ctx or model.llm.context_length)
    if len(ids) > limit and not body.truncate:
        raise ContextError(
            f"the text has {len(ids)} tokens, more than the context of {limit}; shorten it, send truncate: true to cut "
            "its end off, or choose a larger num_ctx"
        )
    if not ids:
        raise RequestError("an empty text has no vector")
    return ids[:limit]


def _cut(vector: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """The first numbers, scaled to length 1 again."""
    if dimensions is None:
        return vector
    short = vector[:dimensions]
    return short / max(float(np.linalg.norm(short)), 1e-12)
