"""AWQ (Lin et al. 2024): columns that meet large inputs are scaled up before rounding, and what makes the inputs is
scaled down by the same; then each group's range is cut to where its error is least.

The error of a change ΔW is measured on the linears that share an input, as tr(ΔW M ΔWᵀ) with M the input's second
moments, which is the mean squared change of their outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from puna.quantize.layerwise import STAGES, Moments, sources
from puna.quantize.rtn import in_groups, nearest_codes, round_to_nearest, spacing
from puna.tensor.groupwise import Grouped

Floats = NDArray[np.float32]

_EXPONENTS = np.arange(20) / 20
_SHRINKAGES = 1 - np.arange(10) / 20
_NOT_CUT = ("self_attn.q_proj", "self_attn.k_proj")  # their products are softmax's scores, which cutting distorts


def awq(values: dict[str, Floats], moments: Mapping[str, Moments], group_size: int) -> dict[str, Grouped]:
    """The linears of one layer, by name, as 4 bits with zero points.

    ``values``, all tensors of the layer, get the scales too: the layer's result stays what it was. ``moments`` are
    those of the unchanged layer, by the first linear of each stage.
    """
    second: dict[str, Floats] = {}
    for stage in STAGES:
        moment = moments[stage[0]]
        scale = np.ones(len(moment.magnitude), np.float32)
        if makers := sources(values, stage):
            scale = _best_scale([values[f"{name}.weight"] for name in stage], moment, group_size)
        for maker in makers:
            values[maker] = (values[maker].T / scale).T
        for name in stage:
            values[f"{name}.weight"] = values[f"{name}.weight"] * scale
            second[name] = (moment.second / np.outer(scale, scale)).astype(np.float32)
    quantized = {}
    for name, inputs in second.items():
        matrix = values[f"{name}.weight"]
        cut = matrix if name in _NOT_CUT else _cut(matrix, inputs, group_size)
        quantized[name] = round_to_nearest(cut, 4, group_size, symmetric=False)
    return quantized


def _best_scale(matrices: Sequence[Floats], moment: Moments, group_size: int) -> Floats:
    """Of the scales magnitude ** exponent, that of the least error (section 3.2, eq. 4 and 5): float32[columns]."""
    magnitude = np.maximum(moment.magnitude, 1e-8)
    second = moment.second.astype(np.float32)
    best, best_error = np.ones(len(magnitude), np.float32), np.inf
    for exponent in _EXPONENTS:
        scale = magnitude**exponent
        scale = np.maximum(scale / np.sqrt(scale.max() * scale.min()), 1e-4).astype(np.float32)
        error = 0.0
        for values in matrices:
            rounded = round_to_nearest(values * scale, 4, group_size, symmetric=False).dequantize() / scale
            error += _error(rounded - values, second)
        if error < best_error:
            best, best_error = scale, error
    return best


def _cut(values: Floats, second: Floats, group_size: int) -> Floats:
    """Each group's numbers limited to a part of their largest magnitude, the part of the least error (section 3.2).

    The error of a group is measured on its own columns.
    """
    rows, columns = values.shape
    groups = in_groups(values, group_size)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    count, size = groups.shape[1:]
    own = np.zeros((count, size, size), np.float32)
    for group in range(count):
        block = second[group * size : (group + 1) * size, group * size : (group + 1) * size]
        own[group, : len(block), : len(block)] = block
    best = groups.copy()
    best_error = np.full(groups.shape[:2], np.inf, np.float32)
    for part in _SHRINKAGES:
        limit = largest * np.float32(part)
        cut = np.clip(groups, -limit, limit)
        scales, zeros = spacing(cut, 4, symmetric=False)
        codes = nearest_codes(cut, scales[..., None], zeros[..., None], 4)
        change = (codes - zeros[..., None].astype(np.float32)) * scales[..., None] - groups
        error = np.einsum("rgi,gij,rgj->rg", change, own, change, optimize=True)
        better = error < best_error
        best[better], best_error[better] = cut[better], error[better]
    cut_values: Floats = best.reshape(rows, -1)[:, :columns]
    return cut_values


def _error(change: Floats, second: Floats) -> float:
    return float(np.einsum("ri,ri->", change @ second, change, dtype=np.float64))
