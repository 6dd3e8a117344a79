"""The ops in C++ (csrc/): threads, vector instructions, quantized weights used as they are."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna import _native
from puna.config import ModelConfig
from puna.errors import RequestError
from puna.ops.protocol import Batch, KVCache, Sampled, SamplingRow, UploadedWeight
from puna.ops.threads import default_threads
from puna.tensor import Weight

Floats = NDArray[np.float32]
Angles = tuple[Floats, Floats]
ALIGNMENT = 64


@dataclass
class NativeWeight:
    """A matrix: its encoded rows, for lookup, and once it has been multiplied by, its panels (csrc/panel.hpp)."""

    name: str
    shape: tuple[int, int]
    source: Weight | None
    panels: Any = None
    looked_up: bool = False


@dataclass
class NativeKVCache:
    """One array of keys and one of values for each layer: float16 bits in the layout of csrc/attention.cpp."""

    num_blocks: int
    block_size: int
    keys: list[NDArray[np.uint16]]
    values: list[NDArray[np.uint16]]


class NativeOps:
    """Weights stay in their encoding; activations are quantized to int8 in groups of 32 where the weights are.

    A row's result depends neither on the rows beside it nor on the number of threads. ``threads`` defaults to the
    physical cores this process may use; ``isa`` (``avx512``, ``avx2``, ``portable``) to the environment variable
    PUNA_ISA, else the best this machine has. Raises RequestError when it can't run those instructions, and ImportError
    on import where the extension was not built. After fork() the child computes on one thread.
    """

    name = "native"

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        known = _native.instruction_sets()
        isa = isa or os.environ.get("PUNA_ISA") or known[0]
        if isa not in known:
            raise RequestError(f"this machine cannot run {isa!r} kernels; it has {', '.join(known)} (see PUNA_ISA)")
        self._native = _native.Native(threads or default_threads(), isa)
        self.threads: int = self._native.threads
        self.isa: str = self._native.isa

    def weight(self, weight: Weight) -> UploadedWeight:
        if len(weight.shape) != 2:
            return np.ascontiguousarray(weight.dequantize())
        return NativeWeight(weight.name, (weight.shape[0], weight.shape[1]), weight)

    def new_kv(self, config: ModelConfig, num_blocks: int, block_size: int) -> NativeKVCache:
        keys, values = self._kv_shapes(config, num_blocks, block_size)
        layers = range(config.num_hidden_layers)
        return NativeKVCache(
            num_blocks,
            block_size,
            [np.zeros(keys, np.uint16) for _ in layers],
            [np.zeros(values, np.uint16) for _ in layers],
        )

    def kv_bytes_per_token(self, config: ModelConfig) -> int:
        block_size = 16  # the padding of other sizes costs a little more
        shapes = self._kv_shapes(config, 1, block_size)
        return sum(2 * int(np.prod(shape)) for shape in shapes) * config.num_hidden_layers // block_size

    def embed(self, table: NativeWeight, tokens: NDArray[np.int32]) -> Floats:
        assert table.source is not None, f"{table.name} was packed before its first lookup"
        table.looked_up = True
        out = np.empty((len(tokens), table.shape[1]), np.float32)
        self._native.decode_rows(table.source.type.gguf_id, table.source.data, tokens, out)
        return out

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        out = np.empty_like(x)
        self._native.rms_norm(x, weight, eps, out)
        return out

    def linear(self, x: Floats, w: NativeWeight, bias: Floats | None = None, residual: Floats | None = None) -> Floats:
        out = np.empty((len(x), w.shape[0]), np.float32)
        self._native.linears(x, [w.panels or self._pack(w)], [bias], residual, [out])
        return out

    def linears(
        self, x: Floats, weights: Sequence[NativeWeight], biases: Sequence[Floats | None] | None = None
    ) -> list[Floats]:
        outs = [np.empty((len(x), w.shape[0]), np.float32) for w in weights]
        panels = [w.panels or self._pack(w) for w in weights]
        self._native.linears(x, panels, list(biases) if biases else [None] * len(outs), None, outs)
        return outs

    def rope_angles(self, positions: NDArray[np.int32], inverse_frequencies: Floats, scale: float) -> Angles:
        angles = positions[:, None].astype(np.float32) * inverse_frequencies
        return np.cos(angles) * np.float32(scale), np.sin(angles) * np.float32(scale)

    def rope(self, x: Floats, angles: Angles) -> Floats:
        self._native.rope(x, *angles)
        return x

    def attend(self, q: Floats, k: Floats, v: Floats, kv: KVCache, layer: int, batch: Batch) -> Floats:
        assert isinstance(kv, NativeKVCache)
        out = np.empty_like(q)
        self._native.attend(
            q,
            k,
            v,
            out,
            kv.keys[layer],
            kv.values[layer],
            batch.positions,
            batch.slots,
            batch.seq_starts,
            batch.block_tables,
        )
        return out

    def swiglu(self, gate: Floats, up: Floats) -> Floats:
        self._native.swiglu(gate, up, gate)
        return gate

    def rows(self, x: Floats, index: NDArray[np.int32]) -> Floats:
        return x[index]

    def sample(self, logits: Floats, rows: Sequence[SamplingRow]) -> list[Sampled]:
        return [Sampled(*chosen) for chosen in self._native.sample(logits, rows)]

    def to_host(self, x: Floats) -> Floats:
        return x

    def _kv_shapes(
        self, config: ModelConfig, num_blocks: int, block_size: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shapes: tuple[tuple[int, ...], tuple[int, ...]] = self._native.kv_shapes(
            num_blocks, block_size, config.num_key_value_heads, config.head_dim
        )
        return shapes

    def _pack(self, w: NativeWeight) -> Any:
        """The panels of a matrix, made when it is first multiplied by: an embedding that is no head needs none."""
        assert w.source is not None
        kind, (rows, columns) = w.source.type.gguf_id, w.shape
        packed = _aligned(_native.packed_bytes(kind, rows, columns))
        self._native.pack(kind, rows, columns, np.ascontiguousarray(w.source.data), packed)
        w.panels = _native.Panels(kind, rows, columns, packed)
        if not _drop_mapped_pages(w.source.data) and not w.looked_up:
            w.source = None  # no file behind it: free the memory
        return w.panels


def _aligned(size: int) -> NDArray[np.uint8]:
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size]


def _drop_mapped_pages(data: NDArray[np.uint8]) -> bool:
    """Tell the system that these pages of a mapped file are not needed soon. False when no file is behind them."""
    owner: Any = data
    while isinstance(owner, np.ndarray | memoryview):
        owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
    if not isinstance(owner, mmap.mmap):
        return False
    if hasattr(mmap, "MADV_DONTNEED"):
        start = data.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # pages that lie wholly within
        length = (start + data.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0:
            owner.madvise(mmap.MADV_DONTNEED, first, length)
    return True
