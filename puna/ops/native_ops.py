"""The ops in C++ (csrc/): threads, vector instructions, quantized weights used as they are."""

from __future__ import annotations

import copy
import hashlib
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import puna._native as _native
from puna import __version__
from puna.config import ModelConfig
from puna.errors import RequestError
from puna.ops.kv_types import kv_quant_type
from puna.ops.native_program import Forward, Traced, trace
from puna.ops.packed_file import PackedFile, PackedMatrix, packed_error
from puna.ops.protocol import Batch, KVCache, Sampled, SamplingRow, UploadedWeight
from puna.ops.threads import default_threads
from puna.tensor import QUANT_TYPES, LowRank, Weight
from puna.tensor.mapped import drop_mapped_pages
from puna.tensor.types import QuantType
from puna.tensor.widen import as_q8_0

Floats = NDArray[np.float32]
Angles = tuple[Floats, Floats]
ALIGNMENT = 64
MAPPING_BYTES = 32 << 20
PACKED_AT_ONCE = 4 << 20
PANEL_ROWS = 16  # of csrc/panel.hpp
# Python's default is memory to share with child processes, for which Linux seldom gives large pages.
_OWN_MEMORY = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}


@dataclass
class NativeWeight:
    """A matrix: its encoded rows, for lookup, and once it has been multiplied by, its panels (csrc/panel.hpp)."""

    name: str
    shape: tuple[int, int]
    source: Weight | None
    panels: Any = None
    looked_up: bool = False
    changes: ClassVar[None] = None

    def lookup(self) -> tuple[int, NDArray[np.uint8]]:
        """The type's number and the encoded rows, which are kept from now on."""
        assert self.source is not None, f"{self.name} was packed before its first lookup"
        self.looked_up = True
        return self.source.type.gguf_id, self.source.data


@dataclass(frozen=True)
class AdaptedWeight:
    """A matrix, and the ``changes`` that adapters make to it (_native.Changes)."""

    base: NativeWeight
    changes: Any

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape


Matrix = NativeWeight | AdaptedWeight
NativeChange = tuple[Floats, Floats, float]


@dataclass
class NativeKVCache:
    """``data[block]`` are the bytes of a block, all layers of it, in the layout of csrc/cache.hpp."""

    num_blocks: int
    block_size: int
    encoding: QuantType
    data: NDArray[np.uint8]
    native: Any


def instruction_set(name: str | None = None) -> str:
    """The kernels of that name, by default what PUNA_ISA says, else the best this machine has. Raises RequestError."""
    known: list[str] = _native.instruction_sets()
    name = name or os.environ.get("PUNA_ISA") or known[0]
    if name not in known:
        raise RequestError(f"this machine cannot run {name!r} kernels; it has {', '.join(known)} (see PUNA_ISA)")
    return name


class NativeOps:
    """Weights stay in their encoding; activations are quantized to int8 in groups of 32 where the weights are, and
    rounded to bfloat16 for bfloat16 weights where the instructions multiply those (``avx512bf16``).

    A row's result depends neither on the rows beside it nor on the number of threads. ``threads`` defaults to the
    physical cores this process may use; ``isa`` (``avx512bf16``, ``avx512``, ``avx2``, ``neon``, ``portable``) to
    the environment variable PUNA_ISA, else the best this machine has. Raises RequestError when it can't run those
    instructions, and ImportError on import where the extension was not built. After fork() the child computes on one
    thread.
    """

    name = "native"
    panel_layout: int = _native.panel_layout

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        self._native = _native.Native(threads or default_threads(), instruction_set(isa))
        self._panel_memory = _PanelMemory()
        self._adapters: tuple[NDArray[np.int32], NDArray[np.int32]] | None = None
        self.threads: int = self._native.threads
        self.isa: str = self._native.isa

    def weight(self, weight: Weight) -> UploadedWeight:
        if len(weight.shape) != 2:
            return np.ascontiguousarray(weight.dequantize())
        return NativeWeight(weight.name, (weight.shape[0], weight.shape[1]), _readable(weight))

    def low_rank(self, change: LowRank) -> NativeChange:
        return np.ascontiguousarray(change.a), np.ascontiguousarray(change.b.T), change.scale

    def adapted(self, weight: NativeWeight, changes: Sequence[NativeChange | None]) -> AdaptedWeight:
        return AdaptedWeight(weight, _native.Changes(*weight.shape, list(changes)))

    def encode(
        self, kind: QuantType, values: NDArray[np.float32], importance: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]:
        """float32[rows, columns] -> uint8[rows, row bytes], the same bytes as ``kind.encode``, many times faster.

        Raises CheckpointError as that does.
        """
        encoded = np.empty((values.shape[0], kind.row_bytes(values.shape[1])), np.uint8)
        known = kind.block_size > 1 and kind.can_encode
        if not known or not self._native.encode_rows(kind.gguf_id, values, importance, encoded):
            return kind.encode(values, importance)  # which says what is wrong
        return encoded

    def decode(self, weight: Weight) -> Floats:
        """The numbers of a matrix, the same as ``weight.dequantize()``, many times faster where there are kernels."""
        if not _has_kernels(weight.type):
            return weight.dequantize()
        out = np.empty(weight.shape, np.float32)
        self._native.decode_rows(weight.type.gguf_id, weight.data, None, out)
        return out

    def pack(self, weight: Weight, destination: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """The panels of a matrix, in zeros at a multiple of 64 bytes that are given or made."""
        weight = _readable(weight)
        kind, (rows, columns) = weight.type.gguf_id, weight.shape
        if destination is None:
            destination = _untouched_zeros(_native.packed_bytes(kind, rows, columns))
        step = max(PACKED_AT_ONCE // weight.data.shape[1] // PANEL_ROWS, 1) * PANEL_ROWS
        for first in range(0, rows, step):  # so that not all of a mapped file's matrix is in memory beside its panels
            data = weight.data[first : first + step]
            at, end = (_native.packed_bytes(kind, n, columns) for n in (first, first + len(data)))
            self._native.pack(kind, len(data), columns, np.ascontiguousarray(data), destination[at:end])
            drop_mapped_pages(data)
        return destination

    def packed_matrix(self, weight: Weight) -> PackedMatrix:
        """What a packed file says of a matrix, its place left open."""
        rows, columns = weight.shape
        kind = weight.type if _has_kernels(weight.type) else QUANT_TYPES["Q8_0"]
        return PackedMatrix(weight.name, kind.name, rows, columns, 0, _native.packed_bytes(kind.gguf_id, rows, columns))

    def packed_weight(self, file: PackedFile, matrix: PackedMatrix, rows: Weight | None = None) -> UploadedWeight:
        """A matrix of a packed file, ready for use. ``rows``: its encoded rows, for a table that tokens look up.

        Raises CheckpointError when the type is unknown or the matrix has another size than its shape calls for.
        """
        if matrix.type not in QUANT_TYPES:
            raise packed_error(file.path, f"{matrix.name} is of the unknown type {matrix.type[:50]!a}")
        kind = QUANT_TYPES[matrix.type].gguf_id
        if not 0 < matrix.size == _native.packed_bytes(kind, matrix.rows, matrix.columns):
            raise packed_error(file.path, f"{matrix.name} has {matrix.size} bytes, which its shape does not call for")
        panels = _native.Panels(kind, matrix.rows, matrix.columns, file.panels(matrix))
        return NativeWeight(matrix.name, (matrix.rows, matrix.columns), rows and _readable(rows), panels)

    def new_kv(
        self, config: ModelConfig, num_blocks: int, block_size: int, kv_type: str | None = None
    ) -> NativeKVCache:
        shape = self._cache_shape(config, num_blocks, block_size, kv_type)
        buffer = _untouched_zeros(_native.cache_bytes(*shape))
        return NativeKVCache(
            num_blocks,
            block_size,
            kv_quant_type(kv_type or "f16", config.head_dim),
            buffer.reshape(num_blocks, -1),
            _native.Cache(*shape, buffer),
        )

    def kv_bytes_per_token(self, config: ModelConfig, kv_type: str | None = None) -> int:
        block_size = 16  # the padding of other sizes costs a little more
        return int(_native.cache_bytes(*self._cache_shape(config, 1, block_size, kv_type))) // block_size

    def export_block(self, kv: KVCache, block: int) -> memoryview:
        assert isinstance(kv, NativeKVCache)
        return memoryview(kv.data[block].data)

    def import_block(self, kv: KVCache, block: int, data: bytes | memoryview) -> None:
        assert isinstance(kv, NativeKVCache)
        kv.data[block] = np.frombuffer(data, np.uint8)

    def cache_identity(self, kv: KVCache) -> str:
        """Another build of the extension may round otherwise or lay blocks out otherwise, so its digest is part."""
        assert isinstance(kv, NativeKVCache)
        build = hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()
        return f"native {__version__} {build}, {self.isa}, {kv.encoding.name}, blocks of {kv.block_size}"

    def compiled(self, forward: Forward) -> Callable[[Batch, KVCache], Floats]:
        return _Compiled(self, forward)

    def panels(self, w: Matrix) -> Any:
        """The panels of a matrix, made when it is first multiplied by: an embedding that is no head needs none."""
        base = w.base if isinstance(w, AdaptedWeight) else w
        return base.panels or self._pack(base)

    def for_batch(self, batch: Batch) -> NativeOps:
        """These ops, with the adapters of one batch."""
        if batch.adapters is None:
            return self
        ops = copy.copy(self)
        ops._adapters = batch.adapters, batch.seq_starts
        return ops

    def embed(self, table: NativeWeight, tokens: NDArray[np.int32]) -> Floats:
        out = np.empty((len(tokens), table.shape[1]), np.float32)
        self._native.decode_rows(*table.lookup(), tokens, out)
        return out

    def rms_norm(self, x: Floats, weight: Floats, eps: float) -> Floats:
        out = np.empty_like(x)
        self._native.rms_norm(x, weight, eps, out)
        return out

    def linear(self, x: Floats, w: Matrix, bias: Floats | None = None, residual: Floats | None = None) -> Floats:
        return self._linears(x, [w], [bias], residual)[0]

    def linears(
        self, x: Floats, weights: Sequence[Matrix], biases: Sequence[Floats | None] | None = None
    ) -> list[Floats]:
        return self._linears(x, weights, list(biases) if biases else [None] * len(weights), None)

    def rope_angles(self, positions: NDArray[np.int32], inverse_frequencies: Floats, scale: float) -> Angles:
        shape = (len(positions), inverse_frequencies.shape[-1])
        cosines, sines = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self._native.rope_angles(positions, inverse_frequencies, scale, cosines, sines)
        return cosines, sines

    def rope(self, x: Floats, angles: Angles) -> Floats:
        self._native.rope(x, *angles)
        return x

    def attend(self, q: Floats, k: Floats, v: Floats, kv: KVCache, layer: int, batch: Batch) -> Floats:
        assert isinstance(kv, NativeKVCache)
        out = np.empty_like(q)
        self._native.attend(
            kv.native, layer, q, k, v, out, batch.positions, batch.slots, batch.seq_starts, batch.block_tables
        )
        return out

    def swiglu(self, gate: Floats, up: Floats) -> Floats:
        self._native.swiglu(gate, up, gate)
        return gate

    def rows(self, x: Floats, index: NDArray[np.int32]) -> Floats:
        return x[index]

    def sample(self, logits: Floats, rows: Sequence[SamplingRow]) -> list[Sampled]:
        return list(map(Sampled._make, self._native.sample(logits, rows)))

    def to_host(self, x: Floats) -> Floats:
        return x

    def _linears(
        self, x: Floats, weights: Sequence[Matrix], biases: list[Floats | None], residual: Floats | None
    ) -> list[Floats]:
        outs = [np.empty((len(x), w.shape[0]), np.float32) for w in weights]
        self._native.linears(x, [self.panels(w) for w in weights], biases, residual, outs)
        changes = [w.changes for w in weights]
        if self._adapters is not None and any(changes):
            self._native.add_low_rank(x, *self._adapters, changes, outs)
        return outs

    def _cache_shape(
        self, config: ModelConfig, num_blocks: int, block_size: int, kv_type: str | None
    ) -> tuple[int, int, int, int, int, int]:
        """The arguments of _native.Cache, without its buffer."""
        encoding = kv_quant_type(kv_type or "f16", config.head_dim).gguf_id
        layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
        return encoding, num_blocks, block_size, layers, kv_heads, config.head_dim

    def _pack(self, w: NativeWeight) -> Any:
        assert w.source is not None
        kind, (rows, columns) = w.source.type.gguf_id, w.shape
        packed = self.pack(w.source, self._panel_memory.take(_native.packed_bytes(kind, rows, columns)))
        w.panels = _native.Panels(kind, rows, columns, packed)
        if not drop_mapped_pages(w.source.data) and not w.looked_up:
            w.source = None  # no file behind it: free the memory
        return w.panels


def _has_kernels(kind: QuantType) -> bool:
    return int(_native.packed_bytes(kind.gguf_id, 1, kind.block_size)) > 0


def _readable(weight: Weight) -> Weight:
    """The weight in an encoding that kernels read."""
    return weight if _has_kernels(weight.type) else as_q8_0(weight)


class _Compiled:
    """A forward that is traced at its first call and replayed from then on; where it can't be, called op by op."""

    def __init__(self, ops: NativeOps, forward: Forward) -> None:
        self._ops, self._forward = ops, forward
        self._traced: Traced | None = None
        self._traceable = True

    def __call__(self, batch: Batch, kv: KVCache) -> Floats:
        assert isinstance(kv, NativeKVCache)
        if self._traced is None and self._traceable:
            self._traced = trace(self._forward, batch, kv, self._ops.panels)
            self._traceable = self._traced is not None
        traced = self._traced
        if traced is None:
            eager: Floats = self._forward(self._ops.for_batch(batch), batch, kv)
            return eager
        rows = len(batch.logit_rows if traced.of_logit_rows else batch.tokens)
        result = np.empty((rows, traced.columns), np.float32)
        self._ops._native.run(
            traced.program,
            kv.native,
            batch.tokens,
            batch.positions,
            batch.slots,
            batch.seq_starts,
            batch.block_tables,
            batch.logit_rows,
            batch.adapters,
            result,
        )
        return result


class _PanelMemory:
    """Memory for panels, from large mappings: small matrices share the system's large pages, which are read faster."""

    def __init__(self) -> None:
        self._free = np.empty(0, np.uint8)

    def take(self, size: int) -> NDArray[np.uint8]:
        """Zeros at a multiple of 64 bytes. The mapping lives as long as the last array from it."""
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        if padded > len(self._free):
            self._free = _untouched_zeros(max(padded, MAPPING_BYTES))
        taken, self._free = self._free[:size], self._free[padded:]
        return taken


def _untouched_zeros(size: int) -> NDArray[np.uint8]:
    """Zeros whose pages are taken only when they are used, large ones where the system has them."""
    memory = mmap.mmap(-1, size, **_OWN_MEMORY)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)
