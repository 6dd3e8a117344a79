"""A calibration text passed through a model one layer at a time, so that a layer can be changed before the next sees
what it makes of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from puna.config import ModelConfig
from puna.model import llama
from puna.model.rope import inverse_frequencies
from puna.ops.recording import RecordingOps
from puna.ops.registry import make_ops
from puna.quantize.calibration import Windows, one_sequence
from puna.tensor import Weight

Floats = NDArray[np.float32]
See = Callable[[str, Floats], None]

# The linears of a layer that read the same input, in the order of the computation.
STAGES: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class _AllSeen(Exception):
    """The layer has shown what was asked for; the rest of it need not be computed."""


@dataclass
class Moments:
    """What the text says of an input x of D numbers: ``second`` float64[D, D], the mean of x xᵀ, and ``magnitude``
    float64[D], that of |x|.
    """

    second: NDArray[np.float64]
    magnitude: NDArray[np.float64]


def sources(values: Mapping[str, Floats], stage: tuple[str, ...]) -> tuple[str, ...]:
    """The tensors whose rows make the inputs of a stage; none where a row makes several, as with grouped queries."""
    first = stage[0]
    if first == "self_attn.q_proj":
        return ("input_layernorm.weight",)
    if first == "mlp.gate_proj":
        return ("post_attention_layernorm.weight",)
    source = "self_attn.v_proj" if first == "self_attn.o_proj" else "mlp.up_proj"
    if len(values[f"{source}.weight"]) != values[f"{first}.weight"].shape[1]:
        return ()
    return tuple(name for name in (f"{source}.weight", f"{source}.bias") if name in values)


class LayerByLayer:
    """``inputs`` runs the current layer as it is now, ``advance`` and ``show`` do and go on to the next.

    Everything is computed in float32. Memory: the hidden states of the text, and one layer.
    """

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, Weight], windows: Windows, threads: int | None = None
    ) -> None:
        self.layer = 0
        self._ops = make_ops(None, threads)
        self._config, self._tensors, self._windows = replace(config, num_hidden_layers=1), tensors, windows
        embedding = tensors["model.embed_tokens.weight"]
        self._states = [embedding.take_rows(window).dequantize() for window in windows]
        self.values: dict[str, Floats] = {}
        """The numbers of the current layer's tensors, by what follows ``model.layers.N.``; they may be replaced."""
        self._load()

    def inputs(self, stages: Sequence[tuple[str, ...]]) -> dict[str, Moments]:
        """The moments of the inputs of these stages, by the first linear of each."""
        return self._moments(stages, keep=False)

    def advance(self, stages: Sequence[tuple[str, ...]] = ()) -> dict[str, Moments]:
        """As ``inputs``; what comes out of the layer is what the next one reads."""
        moments = self._moments(stages, keep=True)
        self.layer += 1
        self._load()
        return moments

    def show(self, see: See) -> None:
        """As ``advance``; ``see`` gets the inputs of every stage, by its first linear, a window at a time."""
        self._run(STAGES, keep=True, see=see)
        self.layer += 1
        self._load()

    def _load(self) -> None:
        prefix = f"model.layers.{self.layer}."
        names = [name for name in self._tensors if name.startswith(prefix)]
        self.values = {name.removeprefix(prefix): self._tensors[name].dequantize() for name in names}

    def _moments(self, stages: Sequence[tuple[str, ...]], keep: bool) -> dict[str, Moments]:
        sums: dict[str, Moments] = {}

        def see(name: str, x: Floats) -> None:
            second, magnitude = (x.T @ x).astype(np.float64), np.abs(x).sum(axis=0, dtype=np.float64)
            if name in sums:
                sums[name].second += second
                sums[name].magnitude += magnitude
            else:
                sums[name] = Moments(second, magnitude)

        self._run(stages, keep, see)
        tokens = sum(map(len, self._windows))
        return {name: Moments(m.second / tokens, m.magnitude / tokens) for name, m in sums.items()}

    def _run(self, stages: Sequence[tuple[str, ...]], keep: bool, see: See) -> None:
        wanted = [stage[0] for stage in STAGES if stage in stages]

        def observe(names: Sequence[str], x: Floats) -> None:
            first = names[0].removesuffix(".weight")
            if first in wanted:
                see(first, x)
                if first == wanted[-1] and not keep:
                    raise _AllSeen

        ops = RecordingOps(self._ops, observe)
        block = self._block(ops)
        for i, window in enumerate(self._windows):
            batch, kv = one_sequence(window), ops.new_kv(self._config, 1, len(window), "f32")
            frequencies, scale = inverse_frequencies(self._config, batch)
            angles = ops.rope_angles(batch.positions, frequencies, scale)
            with suppress(_AllSeen):
                x = llama.run_block(ops, self._config, block, self._states[i], angles, 0, batch, kv)
                if keep:
                    self._states[i] = x

    def _block(self, ops: RecordingOps) -> llama.Block:
        uploaded = {
            f"model.layers.0.{name}": ops.weight(Weight.from_array(name, values))
            for name, values in self.values.items()
        }
        outer = dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"))
        return llama.bind(self._config, uploaded | outer).blocks[0]
