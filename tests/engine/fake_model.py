"""A model whose next token depends on every token of the history, read back through the paged tables.

The cache stores token ids and positions. Any mistake of paging, scheduling, preemption or prefix reuse (a wrong slot, a
stale block, a skipped token) changes what is read and so the output, or trips an assertion.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import tiny_config

from puna.config import ModelConfig
from puna.ops.protocol import Batch, Sampled, SamplingRow
from puna.ops.reference_sampling import sample_rows


@dataclass
class FakeKV:
    num_blocks: int
    block_size: int
    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]


class FakeOps:
    name = "fake"

    def new_kv(self, config: ModelConfig, num_blocks: int, block_size: int, kv_type: str | None = None) -> FakeKV:
        slots = num_blocks * block_size
        return FakeKV(num_blocks, block_size, np.full(slots, -1), np.full(slots, -1))

    def kv_bytes_per_token(self, config: ModelConfig, kv_type: str | None = None) -> int:
        return 16

    def export_block(self, kv: FakeKV, block: int) -> memoryview:
        slots = slice(block * kv.block_size, (block + 1) * kv.block_size)
        return np.concatenate([kv.tokens[slots], kv.positions[slots]]).view(np.uint8).data

    def import_block(self, kv: FakeKV, block: int, data: bytes | memoryview) -> None:
        slots = slice(block * kv.block_size, (block + 1) * kv.block_size)
        kv.tokens[slots], kv.positions[slots] = np.frombuffer(data, np.int64).reshape(2, -1)

    def cache_identity(self, kv: FakeKV) -> str:
        return f"fake, blocks of {kv.block_size}"

    def to_host(self, x: Any) -> NDArray[np.float32]:
        return np.asarray(x, np.float32)

    def sample(self, logits: Any, rows: list[SamplingRow]) -> list[Sampled]:
        assert len(logits) == len(rows)
        return sample_rows(logits, rows)


def fake_logits(history: NDArray[np.int64], vocab_size: int, habit: float = 0.0) -> NDArray[np.float32]:
    """float32[V], decided by the whole history, and by the last token alone as far as ``habit`` goes."""
    if habit:
        return fake_logits(history, vocab_size) + np.float32(habit) * fake_logits(history[-1:], vocab_size)
    digest = hashlib.blake2b(np.ascontiguousarray(history, np.int64).tobytes(), digest_size=8).digest()
    return 3 * np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(vocab_size, dtype=np.float32)


class FakeModel:
    """With a ``habit`` its texts repeat themselves, and two models of different habits often agree."""

    def __init__(self, vocab_size: int = 50, context_length: int = 64, habit: float = 0.0) -> None:
        self.habit = habit
        self.config = tiny_config(vocab_size=vocab_size, max_position_embeddings=context_length)
        self.ops: Any = FakeOps()
        self.steps: list[list[int]] = []  # how many tokens each sequence computed, by step

    def hidden(self, batch: Batch, kv: Any) -> NDArray[np.float32]:
        """float32[T, V]: the logits of every token."""
        every = np.arange(len(batch.tokens), dtype=np.int32)
        return self.forward(replace(batch, logit_rows=every), kv)

    def forward(self, batch: Batch, kv: Any) -> NDArray[np.float32]:
        counts = np.diff(batch.seq_starts)
        self.steps.append(counts.tolist())
        total = len(batch.tokens)
        assert counts.sum() == total == len(batch.positions) == len(batch.slots)
        assert (counts > 0).all()
        assert len(set(batch.slots.tolist())) == total, "two tokens of one step share a slot"
        for array in (batch.tokens, batch.block_tables, batch.slots, batch.context_lens, batch.logit_rows):
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        kv.tokens[batch.slots] = batch.tokens
        kv.positions[batch.slots] = batch.positions
        self.kv = kv
        logits = []
        for row in batch.logit_rows:
            s = int(np.searchsorted(batch.seq_starts, row, side="right")) - 1
            assert batch.context_lens[s] == batch.positions[batch.seq_starts[s + 1] - 1] + 1
            context = np.arange(batch.positions[row] + 1)
            slots = batch.block_tables[s, context // kv.block_size] * kv.block_size + context % kv.block_size
            assert (kv.positions[slots] == context).all(), "the context holds a position it should not"
            logits.append(fake_logits(kv.tokens[slots], self.config.vocab_size, self.habit))
        return np.array(logits, np.float32).reshape(len(logits), self.config.vocab_size)
