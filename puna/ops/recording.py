"""Ops that show what each linear reads: the one hook for calibration and for looking inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.config import ModelConfig
from puna.errors import RequestError
from puna.ops.protocol import Array, Batch, KVCache, Ops, Sampled, SamplingRow, UploadedChange, UploadedWeight
from puna.tensor import LowRank, Weight

Observe = Callable[[Sequence[str], NDArray[np.float32]], None]


class RecordingOps:
    """Forwards everything to ``ops`` and hands each linear's input to ``observe``.

    ``observe(names, x)`` gets the names of the weights that read the same input, and that input, float32[T, in], which
    is valid only during the call. A weight is known by its name when these ops uploaded it.
    """

    name = "recording"

    def __init__(self, ops: Ops, observe: Observe) -> None:
        self._ops = ops
        self._observe = observe
        self._names: dict[int, tuple[str, UploadedWeight]] = {}  # kept alive, so that an id stays one weight's

    def weight(self, weight: Weight) -> UploadedWeight:
        uploaded = self._ops.weight(weight)
        self._names[id(uploaded)] = (weight.name, uploaded)
        return uploaded

    def compiled(self, forward: Callable[[Ops, Batch, KVCache], Array]) -> Callable[[Batch, KVCache], Array]:
        """The plain Python forward: what is compiled shows nothing. Raises RequestError for a batch with adapters."""

        def run(batch: Batch, kv: KVCache) -> Array:
            if batch.adapters is not None:
                raise RequestError("what a model with an adapter reads cannot be recorded; leave the adapter out")
            return forward(self, batch, kv)

        return run

    def low_rank(self, change: LowRank) -> UploadedChange:
        return self._ops.low_rank(change)

    def adapted(self, weight: UploadedWeight, changes: Sequence[UploadedChange | None]) -> UploadedWeight:
        adapted = self._ops.adapted(weight, changes)
        if id(weight) in self._names:
            self._names[id(adapted)] = (self._names[id(weight)][0], adapted)
        return adapted

    def linear(
        self, x: Array, w: UploadedWeight, bias: UploadedWeight | None = None, residual: Array | None = None
    ) -> Array:
        self._show(x, (w,))
        return self._ops.linear(x, w, bias, residual)

    def linears(
        self, x: Array, weights: Sequence[UploadedWeight], biases: Sequence[UploadedWeight | None] | None = None
    ) -> list[Array]:
        self._show(x, weights)
        return self._ops.linears(x, weights, biases)

    def _show(self, x: Array, weights: Sequence[UploadedWeight]) -> None:
        self._observe([self._names[id(w)][0] for w in weights if id(w) in self._names], self._ops.to_host(x))

    def new_kv(self, config: ModelConfig, num_blocks: int, block_size: int, kv_type: str | None = None) -> KVCache:
        return self._ops.new_kv(config, num_blocks, block_size, kv_type)

    def kv_bytes_per_token(self, config: ModelConfig, kv_type: str | None = None) -> int:
        return self._ops.kv_bytes_per_token(config, kv_type)

    def export_block(self, kv: KVCache, block: int) -> memoryview:
        return self._ops.export_block(kv, block)

    def import_block(self, kv: KVCache, block: int, data: bytes | memoryview) -> None:
        self._ops.import_block(kv, block, data)

    def cache_identity(self, kv: KVCache) -> str:
        return self._ops.cache_identity(kv)

    def embed(self, table: UploadedWeight, tokens: NDArray[np.int32]) -> Array:
        return self._ops.embed(table, tokens)

    def rms_norm(self, x: Array, weight: UploadedWeight, eps: float) -> Array:
        return self._ops.rms_norm(x, weight, eps)

    def rope_angles(self, positions: Array, inverse_frequencies: NDArray[np.float32], scale: float) -> Any:
        return self._ops.rope_angles(positions, inverse_frequencies, scale)

    def rope(self, x: Array, angles: Any) -> Array:
        return self._ops.rope(x, angles)

    def attend(self, q: Array, k: Array, v: Array, kv: KVCache, layer: int, batch: Batch) -> Array:
        return self._ops.attend(q, k, v, kv, layer, batch)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self._ops.swiglu(gate, up)

    def rows(self, x: Array, index: NDArray[np.int32]) -> Array:
        return self._ops.rows(x, index)

    def sample(self, logits: Array, rows: Sequence[SamplingRow]) -> list[Sampled]:
        return self._ops.sample(logits, rows)

    def to_host(self, x: Array) -> NDArray[np.float32]:
        return self._ops.to_host(x)
