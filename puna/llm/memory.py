"""What a model will take of the memory, told before it is loaded, and how much of it the cache gets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from puna.checkpoint import Checkpoint, open_checkpoint
from puna.engine.runner import ForwardModel
from puna.errors import RequestError
from puna.ops.protocol import Ops
from puna.store import ResolvedModel

if TYPE_CHECKING:
    from puna.ops.native_ops import NativeOps

DEFAULT_CONTEXT = 8192
BLOCK_SIZE = 32
CACHED_CONTEXTS = 4
MEMORY_INFO = Path("/proc/meminfo")
# The step's arrays, the tokenizer and its vocabulary, Python's own.
OVERHEAD = 128 << 20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of the weights as the ops hold them, of the key/value cache when it is full, and of everything else."""

    weights: int
    cache: int
    overhead: int = OVERHEAD

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.overhead


def estimate_memory(
    ops: Ops, found: ResolvedModel, context_length: int, kv_type: str | None = None, contexts: int = 1
) -> MemoryEstimate:
    """The memory of a model with a cache for ``contexts`` full contexts. Raises CheckpointError, ConfigError."""
    checkpoint = open_checkpoint(found.path)
    cache = ops.kv_bytes_per_token(checkpoint.config, kv_type) * context_length * contexts
    return MemoryEstimate(_weight_bytes(ops, checkpoint), cache)


def cache_blocks(
    models: Sequence[ForwardModel], context_length: int, kv_type: str | None = None, *, explicit: bool
) -> int:
    """How many blocks of BLOCK_SIZE tokens: room for four full contexts, in at most half of the free memory.

    Pages are only taken when they are used. Raises RequestError when a context that was asked for (``explicit``) does
    not fit.
    """
    one_context = -(-context_length // BLOCK_SIZE)
    block_bytes = BLOCK_SIZE * sum(model.ops.kv_bytes_per_token(model.config, kv_type) for model in models)
    affordable = available_memory() // 2 // block_bytes
    if affordable < one_context and explicit:
        raise RequestError(
            f"a context of {context_length} tokens needs {one_context * block_bytes >> 20} MiB of cache, more than "
            f"half of the free memory ({affordable * block_bytes >> 20} MiB); choose a smaller context_length"
        )
    return int(max(1, min(CACHED_CONTEXTS * one_context, affordable)))


def available_memory() -> int:
    """Bytes that programs can still take without swapping."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", MEMORY_INFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:  # what psutil gives too, without the time to import it
        return int(found[1]) << 10
    import psutil

    return int(psutil.virtual_memory().available)


def _weight_bytes(ops: Ops, checkpoint: Checkpoint) -> int:
    """The native ops repack matrices, and keep a tied embedding beside its panels."""
    if ops.name != "native":
        return sum(weight.nbytes for weight in checkpoint.tensors.values())
    native: NativeOps = ops  # type: ignore[assignment]
    size = 0
    for name, weight in checkpoint.tensors.items():
        matrix = len(weight.shape) == 2
        size += native.packed_matrix(weight).size if matrix else weight.nbytes
        size += weight.nbytes if name == "model.embed_tokens.weight" else 0
    return size
