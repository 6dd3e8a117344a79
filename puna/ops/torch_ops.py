"""The ops in PyTorch, with gradients: what training and its evaluation compute in.

A training batch holds whole documents and needs no cache: ``document_batch`` makes one, and NoCache stands in for the
cache. With a cache the attention is that of the reference ops, without gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from puna.config import ModelConfig
from puna.ops.protocol import Array, Batch, KVCache, Ops, Sampled, SamplingRow
from puna.ops.reference import ReferenceOps
from puna.ops.registry import make_ops
from puna.ops.torch_attention import attend_within
from puna.ops.torch_functions import Angles, RMSNorm, Rotate, SwiGLU
from puna.ops.torch_linear import low_rank_product, multiply
from puna.ops.torch_weights import (
    FLOAT_DTYPES,
    AdaptedMatrix,
    Decode,
    EncodedMatrix,
    Matrix,
    as_tensor,
    dense,
)
from puna.tensor import LowRank, Weight


@dataclass
class NoCache:
    """In place of a key/value cache: every sequence of the batch is whole, so its context is the batch's own tokens."""

    head_dim: int
    num_blocks: int = 0
    block_size: int = 1


def document_batch(
    tokens: NDArray[np.integer], seq_starts: NDArray[np.integer], logit_rows: NDArray[np.integer] | None = None
) -> Batch:
    """Whole documents, packed: document s is tokens[seq_starts[s]:seq_starts[s + 1]], at positions from 0.

    ``logit_rows``: the tokens whose logits are wanted; all by default.
    """
    starts = np.asarray(seq_starts, np.int32)
    lengths = np.diff(starts)
    count = len(tokens)
    assert starts[0] == 0
    assert starts[-1] == count
    assert (lengths > 0).all()
    rows = np.arange(count, dtype=np.int32)
    return Batch(
        tokens=np.asarray(tokens, np.int32),
        positions=rows - np.repeat(starts[:-1], lengths),
        seq_starts=starts,
        slots=np.empty(0, np.int32),
        block_tables=np.empty((len(lengths), 0), np.int32),
        context_lens=lengths.astype(np.int32),
        logit_rows=rows if logit_rows is None else np.asarray(logit_rows, np.int32),
    )


class TorchOps:
    """Computes in ``dtype`` (float32, bfloat16 or float64), whatever the weights are kept in, on ``device``.

    Normalising and rotating are done in float32 at least. Quantized matrices stay encoded, and so do those of floats
    wider or narrower than ``dtype``: see EncodedMatrix. ``decode`` expands a quantized matrix; the native ops' by
    default, where they were built.
    """

    name = "torch"

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        decode: Decode | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self._wide = torch.promote_types(dtype, torch.float32)
        if decode is None:
            native = make_ops()
            decode = native.decode if native.name == "native" else Weight.dequantize  # type: ignore[attr-defined]
        self._decode = decode
        self._reference = ReferenceOps()
        self._token_adapters: Tensor | None = None

    def weight(self, weight: Weight) -> Tensor | EncodedMatrix:
        """Vectors and matrices of ``dtype`` become tensors, other matrices stay encoded."""
        if len(weight.shape) != 2:
            return self.numbers(weight, self._wide)
        if FLOAT_DTYPES.get(weight.type.name) != self.dtype:
            return EncodedMatrix(weight.type, as_tensor(weight.data).to(self.device), self._decode)
        return self.numbers(weight)

    def numbers(self, weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
        """Any weight as a tensor of ``dtype``, these ops' own by default; it may share the memory of a mapped file."""
        if (kind := FLOAT_DTYPES.get(weight.type.name)) is not None:
            values = as_tensor(weight.data).view(kind)
        else:
            values = as_tensor(self._decode(weight) if len(weight.shape) == 2 else weight.dequantize())
        return values.reshape(weight.shape).to(self.device, dtype or self.dtype)

    def low_rank(self, change: LowRank) -> tuple[Tensor, Tensor, float]:
        a, b = (as_tensor(matrix).to(self.device, self.dtype) for matrix in (change.a, change.b))
        return a, b, change.scale

    def adapted(
        self, weight: Tensor | EncodedMatrix, changes: Sequence[tuple[Tensor, Tensor, float] | None]
    ) -> AdaptedMatrix:
        return AdaptedMatrix(weight, tuple(changes))

    def dense(self, w: Matrix) -> Tensor:
        """A matrix in numbers of ``dtype``, with gradients towards what is trained of it."""
        return dense(w, self.dtype)

    def new_kv(self, config: ModelConfig, num_blocks: int, block_size: int, kv_type: str | None = None) -> KVCache:
        return self._reference.new_kv(config, num_blocks, block_size, kv_type)

    def kv_bytes_per_token(self, config: ModelConfig, kv_type: str | None = None) -> int:
        return self._reference.kv_bytes_per_token(config, kv_type)

    def export_block(self, kv: KVCache, block: int) -> memoryview:
        return self._reference.export_block(kv, block)

    def import_block(self, kv: KVCache, block: int, data: bytes | memoryview) -> None:
        self._reference.import_block(kv, block, data)

    def cache_identity(self, kv: KVCache) -> str:
        return f"torch {torch.__version__} {self.dtype} {self.device}, {self._reference.cache_identity(kv)}"

    def compiled(self, forward: Callable[[Ops, Batch, KVCache], Array]) -> Callable[[Batch, KVCache], Array]:
        def run(batch: Batch, kv: KVCache) -> Array:
            ops = self
            if batch.adapters is not None:
                ops = copy.copy(self)
                ops._token_adapters = self._index(np.repeat(batch.adapters, np.diff(batch.seq_starts)))
            return forward(ops, batch, kv)

        return run

    def embed(self, table: Matrix, tokens: NDArray[np.int32]) -> Tensor:
        index = self._index(tokens)
        if isinstance(table, EncodedMatrix):
            return table.decode(self.dtype, index)
        assert isinstance(table, Tensor)
        return F.embedding(index, table).to(self.dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normalised: Tensor = RMSNorm.apply(x, weight.to(self._wide), eps)  # type: ignore[no-untyped-call]
        return normalised

    def linear(self, x: Tensor, w: Matrix, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        (y,) = multiply(x, [w], residual)
        return self._completed(x, w, y, bias)

    def linears(
        self, x: Tensor, weights: Sequence[Matrix], biases: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        products = multiply(x, weights)
        biases = biases or [None] * len(weights)
        return [self._completed(x, w, y, b) for w, y, b in zip(weights, products, biases, strict=True)]

    def rope_angles(
        self, positions: NDArray[np.int32], inverse_frequencies: NDArray[np.float32], scale: float
    ) -> Angles:
        at, frequencies = (
            torch.from_numpy(array).to(self.device, self._wide) for array in (positions, inverse_frequencies)
        )
        angles = at[:, None] * frequencies
        return torch.cos(angles) * scale, torch.sin(angles) * scale

    def rope(self, x: Tensor, angles: Angles) -> Tensor:
        rotated: Tensor = Rotate.apply(x, *angles)  # type: ignore[no-untyped-call]
        return rotated

    def attend(self, q: Tensor, k: Tensor, v: Tensor, kv: KVCache, layer: int, batch: Batch) -> Tensor:
        if isinstance(kv, NoCache):
            return attend_within(q, k, v, kv.head_dim, batch.seq_starts.tobytes())
        out = self._reference.attend(self.to_host(q), self.to_host(k), self.to_host(v), kv, layer, batch)
        return torch.from_numpy(out).to(self.device, self.dtype)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        gated: Tensor = SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
        return gated

    def rows(self, x: Tensor, index: NDArray[np.int32]) -> Tensor:
        return x[self._index(index)]

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
        return self._reference.sample(self.to_host(logits), rows)

    def to_host(self, x: Tensor) -> NDArray[np.float32]:
        host: NDArray[np.float32] = x.detach().float().cpu().numpy()
        return host

    def _completed(self, x: Tensor, w: Matrix, y: Tensor, bias: Tensor | None) -> Tensor:
        """With the bias, and what the adapters of the tokens' sequences add."""
        if bias is not None:
            y = y + bias.to(y.dtype)
        if self._token_adapters is not None and isinstance(w, AdaptedMatrix):
            for adapter, change in enumerate(w.changes):
                if change is not None:
                    tokens = torch.nonzero(self._token_adapters == adapter)[:, 0]
                    y = y.index_add(0, tokens, low_rank_product(x[tokens], *change))
        return y

    def _index(self, index: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(index.astype(np.int64)).to(self.device)
