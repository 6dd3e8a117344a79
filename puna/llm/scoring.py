"""What the model thinks of given tokens: logits, log probabilities and embeddings, computed chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from puna.config import ModelConfig
from puna.engine.runner import ForwardModel
from puna.errors import RequestError
from puna.ops.protocol import Array, Batch, KVCache, Ops

BLOCK_SIZE = 32
CHUNK_TOKENS = 512


@dataclass(frozen=True)
class Score:
    """How probable a continuation is, in natural logarithms; ``is_greedy`` when each token was the most probable."""

    logprob: float
    token_ids: list[int]
    token_logprobs: list[float]
    is_greedy: bool


@dataclass(frozen=True)
class AlwaysAdapted:
    """A model with adapters, of which every sequence uses the one of this number."""

    model: ForwardModel
    number: int

    @property
    def ops(self) -> Ops:
        return self.model.ops

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def forward(self, batch: Batch, kv: KVCache) -> Array:
        return self.model.forward(self._adapted(batch), kv)

    def hidden(self, batch: Batch, kv: KVCache) -> Array:
        return self.model.hidden(self._adapted(batch), kv)

    def _adapted(self, batch: Batch) -> Batch:
        return replace(batch, adapters=np.full(len(batch.context_lens), self.number, np.int32))


def logits(model: ForwardModel, ids: Sequence[int], kv_type: str | None = None) -> NDArray[np.float32]:
    """float32[T, V]: row t is the prediction after token t."""
    parts = [model.ops.to_host(model.forward(batch, kv)) for batch, kv in _chunks(model, ids, kv_type)]
    return np.concatenate(parts)


def embedding(model: ForwardModel, ids: Sequence[int], kv_type: str | None = None) -> NDArray[np.float32]:
    """float32[D]: the mean of the final hidden states, scaled to length 1."""
    total = np.zeros(model.config.hidden_size, np.float64)
    for batch, kv in _chunks(model, ids, kv_type):
        total += model.ops.to_host(model.hidden(batch, kv)).sum(axis=0, dtype=np.float64)
    return (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)


def score(
    model: ForwardModel, prompt_ids: Sequence[int], continuation_ids: Sequence[int], kv_type: str | None = None
) -> Score:
    """Log probability of a continuation after a prompt; only one chunk of logits is in memory at a time."""
    if not prompt_ids or not continuation_ids:
        raise RequestError("scoring needs at least one token of prompt and one of continuation")
    ids = [*prompt_ids, *continuation_ids]
    logprobs: list[float] = []
    greedy = True
    for batch, kv in _chunks(model, ids[:-1], kv_type, first_row=len(prompt_ids) - 1):
        if not len(batch.logit_rows):
            model.hidden(batch, kv)
            continue
        rows = model.ops.to_host(model.forward(batch, kv)).astype(np.float64)
        targets = np.asarray(ids)[batch.positions[batch.logit_rows] + 1]
        highest = rows.max(axis=-1)
        normaliser = highest + np.log(np.exp(rows - highest[:, None]).sum(axis=-1))
        logprobs += (rows[np.arange(len(rows)), targets] - normaliser).tolist()
        greedy = greedy and bool((rows.argmax(axis=-1) == targets).all())
    return Score(sum(logprobs), list(continuation_ids), logprobs, greedy)


def _chunks(
    model: ForwardModel, ids: Sequence[int], kv_type: str | None, first_row: int = 0
) -> Iterator[tuple[Batch, KVCache]]:
    """One sequence in consecutive blocks, some tokens at a time; logits are wanted from position ``first_row`` on."""
    config = model.config
    try:
        tokens = np.asarray(ids)
    except ValueError:  # lists of unequal lengths
        tokens = np.empty(0)
    if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
        raise RequestError("expected a list of at least one token id")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise RequestError(f"token ids must be from 0 to {config.vocab_size - 1}, the model's vocabulary")
    blocks = -(-len(tokens) // BLOCK_SIZE)
    kv = model.ops.new_kv(config, blocks, BLOCK_SIZE, kv_type)
    for start in range(0, len(tokens), CHUNK_TOKENS):
        positions = np.arange(start, min(start + CHUNK_TOKENS, len(tokens)), dtype=np.int32)
        batch = Batch(
            tokens=tokens[positions].astype(np.int32),
            positions=positions,
            seq_starts=np.array([0, len(positions)], np.int32),
            slots=positions,
            block_tables=np.arange(blocks, dtype=np.int32)[None],
            context_lens=np.array([positions[-1] + 1], np.int32),
            logit_rows=np.arange(max(first_row - start, 0), len(positions), dtype=np.int32),
        )
        yield batch, kv
