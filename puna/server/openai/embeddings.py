"""/v1/embeddings: texts as vectors."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from numpy.typing import NDArray
from pydantic import Field

from puna.llm import LLM
from puna.server.auth import Tenant
from puna.server.embedding import embed
from puna.server.http_errors import FieldError
from puna.server.openai.fields import Body, KeptTokens, Text, TokenIds
from puna.server.openai.sampling import check_ids
from puna.server.sending import json_response, unless_disconnected
from puna.server.service import Service, TheService

router = APIRouter(tags=["OpenAI"])

Several = Field(min_length=1, max_length=2048)


class EmbeddingBody(Body):
    """A request for the vectors of texts, or of lists of token ids."""

    model: str
    input: Text | TokenIds | Annotated[list[Text], Several] | Annotated[list[TokenIds], Several]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Keep only so many numbers of each vector, scaled to length 1 again."
    )
    truncate_prompt_tokens: KeptTokens | None = Field(
        None, description="Keep only so many tokens of each text's end; -1: as many as the context holds."
    )
    user: str | None = Field(None, description="Accepted without effect.")


@router.post("/v1/embeddings", response_model=None)
async def create_embeddings(body: EmbeddingBody, request: Request, service: TheService, tenant: Tenant) -> Response:
    """The vectors of texts."""
    return await unless_disconnected(request, embed_texts(service, body, tenant))


async def embed_texts(service: Service, body: EmbeddingBody, tenant: str) -> Response:
    async with service.manager.use(body.model) as model:
        llm = model.llm
        size = llm.config.hidden_size
        if body.dimensions is not None and body.dimensions > size:
            raise FieldError(f"dimensions must be at most {size}, found {body.dimensions}", "dimensions")
        prompts = await asyncio.to_thread(_prompts, llm, body)
        vectors = await embed(model, prompts, tenant=tenant)
    if body.dimensions is not None:
        vectors = vectors[:, : body.dimensions]
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    count = sum(map(len, prompts))
    data = [
        {"object": "embedding", "index": i, "embedding": _shown(vector, body.encoding_format)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return json_response({"object": "list", "data": data, "model": body.model, "usage": usage})


def _prompts(llm: LLM, body: EmbeddingBody) -> list[Sequence[int]]:
    given: Any = [body.input] if isinstance(body.input, str) or isinstance(body.input[0], int) else body.input
    prompts: list[Sequence[int]] = []
    for text in given:
        if not isinstance(text, str):
            check_ids(llm, text, "input")
        prompts.append(llm.encode(text) if isinstance(text, str) else text)
    if not all(prompts):
        raise FieldError("input has a text without tokens", "input")
    keep = llm.context_length if body.truncate_prompt_tokens == -1 else body.truncate_prompt_tokens
    return prompts if keep is None else [ids[-keep:] for ids in prompts]


def _shown(vector: NDArray[np.float32], encoding: str | None) -> list[float] | str:
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return [float(number) for number in vector]
