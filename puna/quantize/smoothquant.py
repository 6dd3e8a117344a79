"""SmoothQuant (Xiao et al. 2023): columns that meet the largest inputs are scaled up and those inputs down, so that
both can be rounded to 8 bits: the inputs with one scale for each token, the weights with one for each row.

What scales the inputs down is folded into what makes them: the norm before, and, at no loss, the rows of the linear
before, whose own scales take it up.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.quantize.layerwise import STAGES, sources
from puna.quantize.rtn import round_to_nearest
from puna.tensor.groupwise import Grouped

Floats = NDArray[np.float32]

_ALPHAS = np.arange(1, 20) / 20
_ROWS = 512


class InputSamples:
    """Of the inputs of each stage, by its first linear: the largest magnitudes, and some tokens' numbers."""

    def __init__(self, windows: int) -> None:
        self._rows = max(1, _ROWS // windows)
        self.largest: dict[str, Floats] = {}
        self._samples: dict[str, list[Floats]] = {}

    def see(self, name: str, x: Floats) -> None:
        """The inputs of a window's tokens, float32[T, D]."""
        largest = np.abs(x).max(axis=0)
        self.largest[name] = np.maximum(self.largest.get(name, largest), largest)
        self._samples.setdefault(name, []).append(x[:: max(1, len(x) // self._rows)].copy())

    def sample(self, name: str) -> Floats:
        return np.concatenate(self._samples[name])


def smoothquant(values: dict[str, Floats], inputs: InputSamples) -> dict[str, Grouped]:
    """The linears of one layer, by name, in 8 bits.

    ``values``, all tensors of the layer, get the scales: the layer's result stays what it was. ``inputs`` are those of
    the unchanged layer.
    """
    for stage in STAGES:
        if makers := sources(values, stage):
            scale = _best_scale([values[f"{name}.weight"] for name in stage], inputs, stage[0])
            for maker in makers:
                values[maker] = (values[maker].T / scale).T
            for name in stage:
                values[f"{name}.weight"] = values[f"{name}.weight"] * scale
    return {name: rounded_rows(values[f"{name}.weight"]) for stage in STAGES for name in stage}


def rounded_rows(values: Floats) -> Grouped:
    return round_to_nearest(values, 8, -1, symmetric=True)


def rounded_tokens(x: Floats) -> Floats:
    """Inputs float32[T, D] as they are when each token's are 8 bits with a scale of their own."""
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True) / np.float32(127.5), np.float32(1e-30))
    rounded: Floats = np.clip(np.rint(x / scale), -128, 127) * scale
    return rounded


def _best_scale(matrices: list[Floats], inputs: InputSamples, name: str) -> Floats:
    """Of no scale and those of section 4 (eq. 4) for many strengths α, that of the least error: float32[columns]."""
    x = inputs.sample(name)
    magnitude = np.maximum(inputs.largest[name], np.float32(1e-5))
    column = np.maximum(np.max([np.abs(values).max(axis=0) for values in matrices], axis=0), np.float32(1e-5))
    best = np.ones(len(column), np.float32)
    best_error = _error(matrices, x, best)
    for alpha in _ALPHAS:
        scale = (magnitude**alpha / column ** (1 - alpha)).astype(np.float32)
        scale = np.maximum(scale / np.sqrt(scale.max() * scale.min()), np.float32(1e-4))
        error = _error(matrices, x, scale)
        if error < best_error:
            best, best_error = scale, error
    return best


def _error(matrices: list[Floats], x: Floats, scale: Floats) -> float:
    """The squared error of what the matrices make of the sample."""
    rounded = rounded_tokens(x / scale)
    error = 0.0
    for values in matrices:
        found = rounded @ rounded_rows(values * scale).dequantize().T
        error += float(np.square(found - x @ values.T).sum(dtype=np.float64))
    return error
