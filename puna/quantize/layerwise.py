"""A calibration text passed through a model one layer at a time, so that a layer can be changed before the next sees
what it makes of the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from puna.config import ModelConfig
from puna.model import llama
from puna.model.rope import inverse_frequencies
from puna.ops.recording import RecordingOps
from puna.ops.reference import ReferenceOps
from puna.quantize.calibration import Windows, one_sequence
from puna.tensor import Weight

Floats = NDArray[np.float32]

# The linears of a layer that read the same input, in the order of the computation.
STAGES: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


@dataclass
class Moments:
    """What the text says of an input x of D numbers: ``second`` float64[D, D], the mean of x xᵀ, and ``magnitude``
    float64[D], that of |x|.
    """

    second: NDArray[np.float64]
    magnitude: NDArray[np.float64]


class LayerByLayer:
    """``inputs`` runs the current layer as it is now, ``advance`` does and goes on to the next.

    Everything is computed in float32. Memory: the hidden states of the text, and one layer.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Weight], windows: Windows) -> None:
        self.layer = 0
        self._config, self._tensors, self._windows = replace(config, num_hidden_layers=1), tensors, windows
        embedding = tensors["model.embed_tokens.weight"]
        self._states = [embedding.take_rows(window).dequantize() for window in windows]
        self.values: dict[str, Floats] = {}
        """The numbers of the current layer's tensors, by what follows ``model.layers.N.``; they may be replaced."""
        self._load()

    def inputs(self, stages: Sequence[tuple[str, ...]]) -> dict[str, Moments]:
        """The moments of the inputs of these stages, by the first linear of each."""
        return self._run({stage[0] for stage in stages}, keep=False)

    def advance(self, stages: Sequence[tuple[str, ...]] = ()) -> dict[str, Moments]:
        """As ``inputs``; what comes out of the layer is what the next one reads."""
        moments = self._run({stage[0] for stage in stages}, keep=True)
        self.layer += 1
        self._load()
        return moments

    def _load(self) -> None:
        prefix = f"model.layers.{self.layer}."
        names = [name for name in self._tensors if name.startswith(prefix)]
        self.values = {name.removeprefix(prefix): self._tensors[name].dequantize() for name in names}

    def _run(self, wanted: set[str], keep: bool) -> dict[str, Moments]:
        sums: dict[str, Moments] = {}

        def observe(names: Sequence[str], x: Floats) -> None:
            first = names[0].removesuffix(".weight")
            if first not in wanted:
                return
            second, magnitude = (x.T @ x).astype(np.float64), np.abs(x).sum(axis=0, dtype=np.float64)
            if first in sums:
                sums[first].second += second
                sums[first].magnitude += magnitude
            else:
                sums[first] = Moments(second, magnitude)

        ops = RecordingOps(ReferenceOps(), observe)
        block = self._block(ops)
        for i, window in enumerate(self._windows):
            batch, kv = one_sequence(window), ops.new_kv(self._config, 1, len(window))
            frequencies, scale = inverse_frequencies(self._config, batch)
            angles = ops.rope_angles(batch.positions, frequencies, scale)
            x = llama.run_block(ops, self._config, block, self._states[i], angles, 0, batch, kv)
            if keep:
                self._states[i] = x
        tokens = sum(map(len, self._windows))
        return {name: Moments(m.second / tokens, m.magnitude / tokens) for name, m in sums.items()}

    def _block(self, ops: RecordingOps) -> llama.Block:
        uploaded = {
            f"model.layers.0.{name}": ops.weight(Weight.from_array(name, values))
            for name, values in self.values.items()
        }
        outer = dict.fromkeys(("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"))
        return llama.bind(self._config, uploaded | outer).blocks[0]
