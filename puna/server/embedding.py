"""Vectors of texts, computed beside the answers that run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from puna.engine import Pooling, Request, SamplingParams
from puna.errors import CapacityError, ContextError, RequestError
from puna.server.manager import ServedModel


async def embed(
    model: ServedModel, prompts: Sequence[Sequence[int]], *, pooling: Pooling = "mean", tenant: str = ""
) -> NDArray[np.float32]:
    """float32[N, D]: the pooled final hidden states of each prompt, scaled to length 1.

    Raises ContextError for a prompt that is longer than the context, RequestError, CapacityError.
    """
    limit = model.llm.context_length
    longest = max(map(len, prompts), default=0)
    if longest > limit:
        raise ContextError(
            f"a text of {longest} tokens is longer than the model's context length of {limit}; shorten it"
        )
    requests = [
        Request(ids, SamplingParams(), cache_salt=tenant, tenant=tenant, pooling=pooling, adapter=model.adapter)
        for ids in prompts
    ]
    vectors = np.zeros((len(prompts), model.llm.config.hidden_size), np.float32)
    accounts = [model.accounting.begin(model.name, tenant, len(ids)) for ids in prompts]
    answers = await model.engine_thread.submit(model.llm.engine, requests)
    try:
        while not answers.ended:
            for index, event in await answers.next():
                if event.embedding is None:
                    if event.finish_reason == "cancelled":
                        raise CapacityError("the model was unloaded before the vectors were ready; ask again", 1.0)
                    raise RequestError(event.error or "the model gave no vector")
                vectors[index] = event.embedding
                accounts[index].end("stop", answers.timings(index))
    finally:
        answers.cancel()
        for index, account in enumerate(accounts):
            account.end("cancelled", answers.timings(index))
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    scaled: NDArray[np.float32] = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return scaled
