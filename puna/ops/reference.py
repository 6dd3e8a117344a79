"""The ops in plain numpy float32: the executable specification that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puna import __version__
from puna.config import ModelConfig
from puna.ops.kv_types import kv_quant_type, round_as
from puna.ops.protocol import Array, Batch, KVCache, Ops, Sampled, SamplingRow
from puna.ops.reference_sampling import sample_rows
from puna.tensor import LowRank, Weight
from puna.tensor.types import QuantType

Floats = NDArray[np.float32]
Angles = tuple[Floats, Floats]


@dataclass
class ReferenceKVCache:
    """Keys and values as float32[layers, slots, kv heads, head_dim], rounded as ``encoding`` would hold them."""

    num_blocks: int
    block_size: int
    encoding: QuantType
    keys: Floats
    values: Floats


@dataclass(frozen=True)
class AdaptedMatrix:
    """A matrix and the changes that adapters make to it, by their numbers."""

    matrix: Floats
    changes: Sequence[LowRank | None]


class ReferenceOps:
    """Clear rather than fast; every weight is expanded to float32 when it is uploaded."""

    name = "reference"

    def __init__(self, token_adapters: NDArray[np.int32] | None = None) -> None:
        """``token_adapters``, int32[T]: the adapter of each token of the one batch that these ops are for."""
        self._token_adapters = token_adapters

    def weight(self, weight: Weight) -> Floats:
        return weight.dequantize()

    def low_rank(self, change: LowRank) -> LowRank:
        return change

    def adapted(self, weight: Floats, changes: Sequence[LowRank | None]) -> AdaptedMatrix:
        return AdaptedMatrix(weight, tuple(changes))

    def new_kv(
        self, config: ModelConfig, num_blocks: int, block_size: int, kv_type: str | None = None
    ) -> ReferenceKVCache:
        encoding = kv_quant_type(kv_type or "f32", config.head_dim)
        shape = (
            config.num_hidden_layers,
            num_blocks * block_size,
            config.num_key_value_heads,
            config.head_dim,
        )
        keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        return ReferenceKVCache(num_blocks, block_size, encoding, keys, values)

    def kv_bytes_per_token(self, config: ModelConfig, kv_type: str | None = None) -> int:
        kv_quant_type(kv_type or "f32", config.head_dim)  # only to refuse what it refuses: numbers are kept in float32
        return 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim

    def export_block(self, kv: KVCache, block: int) -> memoryview:
        assert isinstance(kv, ReferenceKVCache)
        slots = slice(block * kv.block_size, (block + 1) * kv.block_size)
        return np.stack([kv.keys[:, slots], kv.values[:, slots]]).reshape(-1).view(np.uint8).data

    def import_block(self, kv: KVCache, block: int, data: bytes | memoryview) -> None:
        assert isinstance(kv, ReferenceKVCache)
        slots = slice(block * kv.block_size, (block + 1) * kv.block_size)
        layers, _, *head = kv.keys.shape
        kv.keys[:, slots], kv.values[:, slots] = np.frombuffer(data, np.float32).reshape(2, layers, -1, *head)

    def cache_identity(self, kv: KVCache) -> str:
        assert isinstance(kv, ReferenceKVCache)
        return f"reference {__version__}, numpy {np.__version__}, {kv.encoding.name}, blocks of {kv.block_size}"

    def compiled(self, forward: Callable[[Ops, Batch, KVCache], Array]) -> Callable[[Batch, KVCache], Array]:
        def run(batch: Batch, kv: KVCache) -> Array:
            if batch.adapters is None:
                return forward(self, batch, kv)
            return forward(ReferenceOps(np.repeat(batch.adapters, np.diff(batch.seq_starts))), batch, kv)

        return run

    def embed(self, table: Floats, tokens: NDArray[np.int32]) -> Floats:
        return table[tokens]

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        variance = np.mean(np.square(x), axis=-1, keepdims=True)
        normalised: Floats = x / np.sqrt(variance + np.float32(eps)) * weight
        return normalised

    def linear(
        self, x: Floats, w: Floats | AdaptedMatrix, bias: Floats | None = None, residual: Floats | None = None
    ) -> Floats:
        matrix, changes = (w.matrix, w.changes) if isinstance(w, AdaptedMatrix) else (w, ())
        y: Floats = x @ matrix.T
        if bias is not None:
            y += bias
        if residual is not None:
            y += residual
        if self._token_adapters is not None:
            for adapter, change in enumerate(changes):
                if change is not None:
                    tokens = np.flatnonzero(self._token_adapters == adapter)
                    y[tokens] += np.float32(change.scale) * (x[tokens] @ change.a.T) @ change.b.T
        return y

    def linears(
        self,
        x: Floats,
        weights: Sequence[Floats | AdaptedMatrix],
        biases: Sequence[Floats | None] | None = None,
    ) -> list[Floats]:
        return [self.linear(x, w, b) for w, b in zip(weights, biases or [None] * len(weights), strict=True)]

    def rope_angles(self, positions: NDArray[np.int32], inverse_frequencies: Floats, scale: float) -> Angles:
        angles = positions[:, None].astype(np.float32) * inverse_frequencies
        return np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(scale)

    def rope(self, x: Floats, angles: Angles) -> Floats:
        cosines, sines = (a[:, None, :] for a in angles)
        heads = x.reshape(len(x), -1, 2, cosines.shape[-1])
        first, second = heads[:, :, 0], heads[:, :, 1]
        rotated = np.stack([first * cosines - second * sines, second * cosines + first * sines], axis=2)
        return rotated.reshape(x.shape)

    def attend(self, q: Floats, k: Floats, v: Floats, kv: KVCache, layer: int, batch: Batch) -> Floats:
        assert isinstance(kv, ReferenceKVCache)
        keys, values = kv.keys[layer], kv.values[layer]
        groups, head_dim = keys.shape[1:]
        keys[batch.slots] = round_as(kv.encoding, k.reshape(-1, groups, head_dim))
        values[batch.slots] = round_as(kv.encoding, v.reshape(-1, groups, head_dim))
        out = np.empty_like(q)
        for s, (start, end) in enumerate(zip(batch.seq_starts, batch.seq_starts[1:], strict=False)):
            context = np.arange(batch.context_lens[s])
            slots = batch.block_tables[s, context // kv.block_size] * kv.block_size + context % kv.block_size
            visible = context <= batch.positions[start:end, None]
            # [groups, heads of a group, tokens, head_dim] against [groups, 1, context, head_dim]
            queries = q[start:end].reshape(end - start, groups, -1, head_dim).transpose(1, 2, 0, 3)
            context_keys, context_values = (x[slots].transpose(1, 0, 2)[:, None] for x in (keys, values))
            scores = queries @ context_keys.swapaxes(-1, -2) / np.float32(np.sqrt(head_dim))
            scores = np.where(visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[start:end] = (weights @ context_values).transpose(2, 0, 1, 3).reshape(end - start, -1)
        return out

    def swiglu(self, gate: Floats, up: Floats) -> Floats:
        with np.errstate(over="ignore"):  # exp(-gate) past the range gives silu = -0, as it should
            gated: Floats = gate / (1 + np.exp(-gate)) * up
        return gated

    def rows(self, x: Floats, index: NDArray[np.int32]) -> Floats:
        return x[index]

    def sample(self, logits: Floats, rows: Sequence[SamplingRow]) -> list[Sampled]:
        return sample_rows(logits, rows)

    def to_host(self, x: Floats) -> Floats:
        return x
