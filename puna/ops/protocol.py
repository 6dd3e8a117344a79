"""The arithmetic that a model is written in: about a dozen coarse operations over flat batches.

Shapes: T tokens of the batch, S sequences, R rows whose logits are wanted, D hidden size, H query heads, G key/value
heads, d head dimension, V vocabulary. ``Array`` is whatever the implementation computes in (numpy here, torch tensors
elsewhere).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from puna.config import ModelConfig
from puna.tensor import LowRank, Weight

Array = Any
UploadedWeight = Any
UploadedChange = Any


@dataclass(frozen=True)
class Batch:
    """One step of the model: the new tokens of every sequence, flat. There is no prefill/decode distinction.

    ``tokens``, ``positions`` and ``slots`` are int32[T]; ``slots`` is where each token's key and value go
    (``block * block_size + offset``). Sequence s owns tokens ``seq_starts[s]:seq_starts[s + 1]`` (int32[S + 1]),
    reads its context through ``block_tables[s]`` (int32[S, max_blocks]), and spans ``context_lens[s]`` positions once
    this step's tokens are written. ``logit_rows`` (int32[R]) are the token indices whose logits are wanted.
    ``adapters`` (int32[S]) is the number of the adapter (``Ops.adapted``) that each sequence uses, -1 for none; None
    when no sequence uses one.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    seq_starts: NDArray[np.int32]
    slots: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    logit_rows: NDArray[np.int32]
    adapters: NDArray[np.int32] | None = None


class KVCache(Protocol):
    """Paged keys and values of every layer. Owned by the ops that made it; the engine only counts its blocks."""

    num_blocks: int
    block_size: int


class SamplingRow(NamedTuple):
    """How to choose the next token of one row of logits.

    Applied in this order, as transformers' logits processors do: ``repeat_penalty`` (Keskar et al. 2019),
    ``frequency_penalty`` and ``presence_penalty`` (OpenAI) over ``history`` (int32 ids), ``bias``, ``allowed``; then
    ``temperature``, ``top_k`` (0: off), ``top_p``, ``min_p``, ``typical_p``; then the token at cumulative probability
    ``uniform`` in [0, 1), tokens taken in order of their ids. Temperature 0 takes the most probable token (ties: the
    lowest id). ``allowed`` is a bit mask, uint32[ceil(V / 32)], bit i % 32 of word i // 32 set when token i may
    be chosen. ``logprob`` asks for the chosen token's log probability, ``top_logprobs`` for that and for that many of
    the most probable tokens, all from the raw logits (before any of the above).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    history: NDArray[np.int32] | None = None
    bias: dict[int, float] | None = None
    allowed: NDArray[np.uint32] | None = None
    uniform: float = 0.0
    logprob: bool = True
    top_logprobs: int = 0


class Sampled(NamedTuple):
    """A chosen token, its log probability under the raw logits and the most probable tokens, where asked for."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class Ops(Protocol):
    """The only code that looks inside a weight, and the only arithmetic of a model."""

    name: str

    def weight(self, weight: Weight) -> UploadedWeight:
        """Make a matrix or vector ready for use here: convert, repack or move it."""

    def low_rank(self, change: LowRank) -> UploadedChange:
        """Make the change of a matrix ready for use here."""

    def adapted(self, weight: UploadedWeight, changes: Sequence[UploadedChange | None]) -> UploadedWeight:
        """The matrix as several adapters change it: ``changes[i]`` is that of adapter i, None when it makes none.

        In ``linear`` and ``linears`` of a ``compiled`` forward, a token whose sequence has adapter i (Batch.adapters)
        gets x · Wᵀ + bias + residual + scale · (x · Aᵀ) · Bᵀ, every other token what the bare matrix gives.
        """

    def new_kv(self, config: ModelConfig, num_blocks: int, block_size: int, kv_type: str | None = None) -> KVCache:
        """A zeroed cache of ``num_blocks`` blocks of ``block_size`` positions.

        ``kv_type``: one of KV_TYPES (puna/ops/kv_types.py), or None for this implementation's own choice. Raises
        RequestError for a type that is unknown or cannot hold the model's heads.
        """

    def kv_bytes_per_token(self, config: ModelConfig, kv_type: str | None = None) -> int:
        """Bytes that one position occupies in this implementation's cache, over all layers. Raises as ``new_kv``."""

    def export_block(self, kv: KVCache, block: int) -> memoryview:
        """The bytes of one block, all layers of it, contiguous; valid until the block is written."""

    def import_block(self, kv: KVCache, block: int, data: bytes | memoryview) -> None:
        """Set a block to bytes that ``export_block`` gave for a cache of equal ``cache_identity``."""

    def cache_identity(self, kv: KVCache) -> str:
        """All that the bytes of a block depend on, beside the model and the tokens."""

    def compiled(self, forward: Callable[[Ops, Batch, KVCache], Array]) -> Callable[[Batch, KVCache], Array]:
        """What ``forward`` does on these ops, with as little cost beside its arithmetic as they can."""

    def embed(self, table: UploadedWeight, tokens: NDArray[np.int32]) -> Array:
        """Rows of the table: [T, D] float32."""

    def rms_norm(self, x: Array, weight: UploadedWeight, eps: float) -> Array:
        """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019), by row."""

    def linear(
        self, x: Array, w: UploadedWeight, bias: UploadedWeight | None = None, residual: Array | None = None
    ) -> Array:
        """x · wᵀ + bias + residual: [T, in] -> [T, out]."""

    def linears(
        self, x: Array, weights: Sequence[UploadedWeight], biases: Sequence[UploadedWeight | None] | None = None
    ) -> list[Array]:
        """Several linears of the same input, which is prepared once."""

    def rope_angles(self, positions: Array, inverse_frequencies: NDArray[np.float32], scale: float) -> Any:
        """cos and sin of position · inverse frequency, times ``scale``, for one batch.

        ``inverse_frequencies`` is float32[d / 2], or float32[T, d / 2] where tokens differ.
        """

    def rope(self, x: Array, angles: Any) -> Array:
        """Rotate every head of [T, heads · d] in the half-split layout (Su et al. 2021); may work in place."""

    def attend(self, q: Array, k: Array, v: Array, kv: KVCache, layer: int, batch: Batch) -> Array:
        """Write k, v [T, G · d] at ``batch.slots``, then causal attention of q [T, H · d] over each sequence's context.

        Scores are scaled by 1 / sqrt(d); query head h reads key/value head h // (H / G). Returns [T, H · d].
        """

    def swiglu(self, gate: Array, up: Array) -> Array:
        """silu(gate) · up (Shazeer 2020); may work in place."""

    def rows(self, x: Array, index: NDArray[np.int32]) -> Array:
        """Some rows of x."""

    def sample(self, logits: Array, rows: Sequence[SamplingRow]) -> list[Sampled]:
        """Choose one token for each row of logits [R, V]."""

    def to_host(self, x: Array) -> NDArray[np.float32]:
        """The array as numpy float32."""
