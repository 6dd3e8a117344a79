"""A model run on a window of text, with what lies between its layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint import Checkpoint
from puna.errors import CheckpointError
from puna.model.model import Model
from puna.ops.protocol import Batch, Ops
from puna.ops.recording import Observe, RecordingOps

DECODE_TOKENS = 24

_FIRST_LAYER = "model.layers.0."
_READS_STATE = ("self_attn.q_proj.weight", "lm_head.weight", "model.embed_tokens.weight")


@dataclass(frozen=True)
class Trace:
    """Of the scored tokens of a window, ``logits`` float32[R, V], and ``states`` after each layer, float32[R, D].

    A state is what the next layer, or the head, reads: normalised.
    """

    logits: NDArray[np.float32]
    states: list[NDArray[np.float32]] = field(default_factory=list)


class Probe:
    """One model in memory, ready to be run on windows."""

    def __init__(self, name: str, checkpoint: Checkpoint, ops: Ops) -> None:
        self._name = name
        self._ops = ops
        self._states: list[NDArray[np.float32]] = []
        self._recording = RecordingOps(ops, _into(self._states))
        self._model = Model.bind(self._recording, checkpoint.config, checkpoint.tensors)

    def run(self, window: Sequence[int], first: int) -> Trace:
        """What the model makes of the tokens from ``first`` to the last but one, after which a token is known.

        Raises CheckpointError when it computes infinities or NaN.
        """
        self._states.clear()
        tokens = window[:-1]
        kv = self._recording.new_kv(self._model.config, 1, len(tokens))
        scored = np.arange(first, len(tokens), dtype=np.int32)
        logits = self._ops.to_host(self._model.forward(_batch(tokens, 0, scored), kv))
        if not np.isfinite(logits).all():
            raise CheckpointError(f"the weights of {self._name} are broken: its predictions are not finite numbers")
        return Trace(logits, [state[-len(scored) :] for state in self._states])

    def decode_speed(self, prompt: Sequence[int]) -> float:
        """Tokens per second of one sequence after a prompt, from the median of some tokens."""
        model = Model(self._ops, self._model.config, self._model.tensors)
        kv = self._ops.new_kv(model.config, 1, len(prompt) + DECODE_TOKENS)
        last = np.array([len(prompt) - 1], np.int32)
        logits = self._ops.to_host(model.forward(_batch(prompt, 0, last), kv))
        seconds = []
        for position in range(len(prompt), len(prompt) + DECODE_TOKENS):
            token = int(logits[0].argmax())
            began = time.perf_counter()
            logits = self._ops.to_host(model.forward(_batch([token], position, np.zeros(1, np.int32)), kv))
            seconds.append(time.perf_counter() - began)
        return 1 / statistics.median(seconds)


def _into(states: list[NDArray[np.float32]]) -> Observe:
    """Collects what the layers after the first, and the head, read. It knows no probe, which so dies with its name."""

    def observe(names: Sequence[str], x: NDArray[np.float32]) -> None:
        if any(name.endswith(_READS_STATE) and not name.startswith(_FIRST_LAYER) for name in names):
            states.append(x.copy())

    return observe


def _batch(tokens: Sequence[int], start: int, logit_rows: NDArray[np.int32]) -> Batch:
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
    )
