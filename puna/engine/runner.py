"""From a step's integers to a Batch, through the model, to sampled tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from puna.config import ModelConfig
from puna.ops.protocol import Array, Batch, KVCache, Ops, Sampled, SamplingRow
from puna.tensor import Adapter


class ForwardModel(Protocol):
    """What computes a batch: logits or final hidden states."""

    @property
    def ops(self) -> Ops: ...

    @property
    def config(self) -> ModelConfig: ...

    def forward(self, batch: Batch, kv: KVCache) -> Array: ...

    def hidden(self, batch: Batch, kv: KVCache) -> Array: ...


class RunnableModel(ForwardModel, Protocol):
    """What the engine needs of a model: one to which adapters can be added."""

    def upload(self, adapter: Adapter) -> Any: ...

    def adapted(self, adapters: Sequence[Any]) -> RunnableModel: ...


class Cached(Protocol):
    """Tokens whose keys and values lie in blocks: the first ``num_computed`` of them already do.

    ``adapter`` is the number of the adapter that computes them, -1 for none.
    """

    tokens: array[int]
    blocks: array[int]
    num_computed: int
    adapter: int


class Part(Protocol):
    """One sequence's part of a step (scheduler.Work)."""

    @property
    def sequence(self) -> Cached: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def draft(self) -> Sequence[int]: ...

    @property
    def samples(self) -> bool: ...

    @property
    def num_scored(self) -> int: ...


class Runner:
    """Runs steps of ``model``. The arrays of its batches are made once and overwritten by the next step."""

    def __init__(
        self, model: RunnableModel, kv: KVCache, max_batch_tokens: int, max_sequences: int, max_blocks: int
    ) -> None:
        self.model = model
        self._kv = kv
        self._tokens = np.zeros(max_batch_tokens, np.int32)
        self._positions = np.zeros(max_batch_tokens, np.int32)
        self._slots = np.zeros(max_batch_tokens, np.int32)
        self._logit_rows = np.zeros(max_batch_tokens, np.int32)
        self._seq_starts = np.zeros(max_sequences + 1, np.int32)
        self._context_lens = np.zeros(max_sequences, np.int32)
        self._block_tables = np.zeros((max_sequences, max_blocks), np.int32)
        self._adapters = np.zeros(max_sequences, np.int32)
        self._last: tuple[tuple[int, int, int, bool], Batch] | None = None

    def run(self, works: Sequence[Part], rows: Sequence[SamplingRow]) -> list[Sampled]:
        """Compute a step. ``rows`` are those of the works that sample, one and one for each drafted token, in order;
        then those of the prompt tokens that are scored.
        """
        logits = self.model.forward(self.batch(works), self._kv)
        return self.model.ops.sample(logits, rows) if rows else []

    def hidden(self, works: Sequence[Part]) -> list[NDArray[np.float32]]:
        """Compute a step; the final hidden states [T, D] of each work's tokens."""
        batch = self.batch(works)
        states = self.model.ops.to_host(self.model.hidden(batch, self._kv))
        return np.split(states, batch.seq_starts[1:-1])

    def batch(self, works: Sequence[Part]) -> Batch:
        """The step as arrays, valid until the next call."""
        size = self._kv.block_size
        end = num_rows = 0
        adapted = False
        for s, work in enumerate(works):
            sequence, draft = work.sequence, work.draft
            count = work.num_tokens + len(draft)
            start, end = end, end + count
            first = sequence.num_computed
            if count == 1:  # the usual case: plain numbers are several times faster than arrays of length one
                self._tokens[start] = sequence.tokens[first]
                self._positions[start] = first
                self._slots[start] = sequence.blocks[first // size] * size + first % size
            else:
                positions = np.arange(first, first + count, dtype=np.int32)
                self._tokens[start : end - len(draft)] = sequence.tokens[first : first + work.num_tokens]
                self._tokens[end - len(draft) : end] = draft
                self._positions[start:end] = positions
                blocks = np.array(sequence.blocks, np.int32)
                self._slots[start:end] = blocks[positions // size] * size + positions % size
            self._block_tables[s, : len(sequence.blocks)] = sequence.blocks
            self._seq_starts[s + 1] = end
            self._context_lens[s] = first + count
            self._adapters[s] = sequence.adapter
            adapted = adapted or sequence.adapter >= 0
            if draft:
                self._logit_rows[num_rows : num_rows + 1 + len(draft)] = range(end - 1 - len(draft), end)
                num_rows += 1 + len(draft)
            elif work.samples:
                self._logit_rows[num_rows] = end - 1
                num_rows += 1
        n = len(works)
        for s, work in enumerate(works):
            if work.num_scored:
                start = self._seq_starts[s]
                self._logit_rows[num_rows : num_rows + work.num_scored] = range(start, start + work.num_scored)
                num_rows += work.num_scored
        shape = n, end, num_rows, adapted
        if self._last is None or self._last[0] != shape:  # while sequences decode, each step has the shape of the last
            self._last = shape, self._views(*shape)
        return self._last[1]

    def _views(self, n: int, end: int, num_rows: int, adapted: bool) -> Batch:
        return Batch(
            tokens=self._tokens[:end],
            positions=self._positions[:end],
            seq_starts=self._seq_starts[: n + 1],
            slots=self._slots[:end],
            block_tables=self._block_tables[:n],
            context_lens=self._context_lens[:n],
            logit_rows=self._logit_rows[:num_rows],
            adapters=self._adapters[:n] if adapted else None,
        )
