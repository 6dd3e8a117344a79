"""A model run on a window of text, with what lies between its layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint import Checkpoint
from puna.checkpoint.lora_writer import merge
from puna.errors import CheckpointError
from puna.model.model import Model
from puna.ops.protocol import Batch, Ops
from puna.ops.recording import Observe, RecordingOps
from puna.tensor import Adapter

DECODE_TOKENS = 24

_FIRST_LAYER = "model.layers.0."
_READS_STATE = ("self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight")


@dataclass(frozen=True)
class Trace:
    """Of the scored tokens of a window, ``logits`` float32[R, V], and ``states`` after each layer, float32[R, D].

    A state is what the next layer, or the head, reads: normalised. Of a model with an adapter beside it there are none.
    """

    logits: NDArray[np.float32]
    states: list[NDArray[np.float32]] = field(default_factory=list)


class Probe:
    """One model in memory, ready to be run on windows; with ``adapter`` it is what a request with that would get.

    DoRA, which cannot be used beside a model, is merged in float32.
    """

    def __init__(self, name: str, checkpoint: Checkpoint, ops: Ops, adapter: Adapter | None = None) -> None:
        self._name = name
        self._ops = ops
        self._states: list[NDArray[np.float32]] = []
        self._adapters: NDArray[np.int32] | None = None
        if adapter is not None and adapter.magnitudes:
            checkpoint, adapter = merge(checkpoint, adapter), None
        bound = Model.bind(RecordingOps(ops, _into(self._states)), checkpoint.config, checkpoint.tensors)
        self._plain = Model(ops, bound.config, bound.tensors)
        self._model = bound
        if adapter is not None:
            self._model = self._plain = self._plain.adapted([self._plain.upload(adapter)])
            self._adapters = np.zeros(1, np.int32)

    def run(self, window: Sequence[int], first: int) -> Trace:
        """What the model makes of the tokens from ``first`` to the last but one, after which a token is known.

        Raises CheckpointError when it computes infinities or NaN.
        """
        self._states.clear()
        tokens = window[:-1]
        kv = self._ops.new_kv(self._model.config, 1, len(tokens))
        scored = np.arange(first, len(tokens), dtype=np.int32)
        logits = self._ops.to_host(self._model.forward(self._batch(tokens, 0, scored), kv))
        if not np.isfinite(logits).all():
            raise CheckpointError(f"the weights of {self._name} are broken: its predictions are not finite numbers")
        return Trace(logits, [state[-len(scored) :] for state in self._states])

    def decode_speed(self, prompt: Sequence[int]) -> float:
        """Tokens per second of one sequence after a prompt, from the median of some tokens."""
        model = self._plain
        kv = self._ops.new_kv(model.config, 1, len(prompt) + DECODE_TOKENS)
        last = np.array([len(prompt) - 1], np.int32)
        logits = self._ops.to_host(model.forward(self._batch(prompt, 0, last), kv))
        seconds = []
        for position in range(len(prompt), len(prompt) + DECODE_TOKENS):
            token = int(logits[0].argmax())
            began = time.perf_counter()
            logits = self._ops.to_host(model.forward(self._batch([token], position, np.zeros(1, np.int32)), kv))
            seconds.append(time.perf_counter() - began)
        return 1 / statistics.median(seconds)

    def _batch(self, tokens: Sequence[int], start: int, logit_rows: NDArray[np.int32]) -> Batch:
        """Tokens of one sequence from position ``start`` on, in a cache of a single block."""
        positions = np.arange(start, start + len(tokens), dtype=np.int32)
        return Batch(
            tokens=np.array(tokens, np.int32),
            positions=positions,
            seq_starts=np.array([0, len(tokens)], np.int32),
            slots=positions,
            block_tables=np.zeros((1, 1), np.int32),
            context_lens=np.array([start + len(tokens)], np.int32),
            logit_rows=logit_rows,
            adapters=self._adapters,
        )


def _into(states: list[NDArray[np.float32]]) -> Observe:
    """Collects what the layers after the first, and the head, read. It knows no probe, which so dies with its name."""

    def observe(names: Sequence[str], x: NDArray[np.float32]) -> None:
        if any(name.endswith(_READS_STATE) and not name.startswith(_FIRST_LAYER) for name in names):
            states.append(x.copy())

    return observe
