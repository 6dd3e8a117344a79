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
        self._max_blocks = max_blocks
        # Written number by number while sequences decode: several times faster than numpy's arrays, which view them.
        self._tokens = _zeros(max_batch_tokens)
        self._positions = _zeros(max_batch_tokens)
        self._slots = _zeros(max_batch_tokens)
        self._logit_rows = _zeros(max_batch_tokens)
        self._seq_starts = _zeros(max_sequences + 1)
        self._context_lens = _zeros(max_sequences)
        self._block_tables = _zeros(max_sequences * max_blocks)
        self._adapters = _zeros(max_sequences)
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
            if count == 1:
                self._tokens[start] = sequence.tokens[first]
                self._positions[start] = first
                self._slots[start] = sequence.blocks[first // size] * size + first % size
            else:
                positions = np.arange(first, first + count, dtype=np.int32)
                blocks = np.array(sequence.blocks, np.int32)
                self._tokens[start : end - len(draft)] = sequence.tokens[first : first + work.num_tokens]
                if draft:
                    self._tokens[end - len(draft) : end] = array("i", draft)
                _view(self._positions)[start:end] = positions
                _view(self._slots)[start:end] = blocks[positions // size] * size + positions % size
            assert len(sequence.blocks) <= self._max_blocks, "a sequence is longer than the context"
            table = s * self._max_blocks
            self._block_tables[table : table + len(sequence.blocks)] = sequence.blocks
            self._seq_starts[s + 1] = end
            self._context_lens[s] = first + count
            self._adapters[s] = sequence.adapter
            adapted = adapted or sequence.adapter >= 0
            if draft:
                num_rows = self._add_rows(num_rows, end - 1 - len(draft), 1 + len(draft))
            elif work.samples:
                self._logit_rows[num_rows] = end - 1
                num_rows += 1
        for s, work in enumerate(works):
            if work.num_scored:
                num_rows = self._add_rows(num_rows, self._seq_starts[s], work.num_scored)
        shape = len(works), end, num_rows, adapted
        if self._last is None or self._last[0] != shape:  # while sequences decode, each step has the shape of the last
            self._last = shape, self._views(*shape)
        return self._last[1]

    def _add_rows(self, num_rows: int, first: int, count: int) -> int:
        """Ask for the logits of some tokens. Returns the number of rows then."""
        self._logit_rows[num_rows : num_rows + count] = array("i", range(first, first + count))
        return num_rows + count

    def _views(self, n: int, end: int, num_rows: int, adapted: bool) -> Batch:
        return Batch(
            tokens=_view(self._tokens)[:end],
            positions=_view(self._positions)[:end],
            seq_starts=_view(self._seq_starts)[: n + 1],
            slots=_view(self._slots)[:end],
            block_tables=_view(self._block_tables).reshape(-1, self._max_blocks)[:n],
            context_lens=_view(self._context_lens)[:n],
            logit_rows=_view(self._logit_rows)[:num_rows],
            adapters=_view(self._adapters)[:n] if adapted else None,
        )


def _zeros(count: int) -> array[int]:
    return array("i", bytes(4 * count))


def _view(numbers: array[int]) -> NDArray[np.int32]:
    return np.frombuffer(numbers, np.int32)
