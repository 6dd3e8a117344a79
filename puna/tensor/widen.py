"""Weights of encodings that kernels do not read, as Q8_0, which they do."""

from __future__ import annotations

from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from puna.errors import CheckpointError
from puna.tensor.bits import Scaled, to_halves
from puna.tensor.types import quant_type
from puna.tensor.weight import Weight

_GROUP = 32
_NUMBERS_AT_ONCE = 1 << 20


def as_q8_0(weight: Weight) -> Weight:
    """The same numbers as Q8_0, where a row is whole blocks of 32.

    Encodings of one scale for 32 whole numbers keep these; only their scales are rounded to float16. Others are
    encoded anew. Raises CheckpointError for what Q8_0 cannot hold.
    """
    columns = weight.shape[-1]
    target = quant_type("Q8_0")
    data = np.empty((*weight.shape[:-1], target.row_bytes(columns)), np.uint8)
    step = max(1, _NUMBERS_AT_ONCE // columns)
    for start in range(0, len(data), step):
        rows = slice(start, start + step)
        try:
            data[rows] = _q8_0_rows(weight.take_rows(rows))
        except CheckpointError as error:
            raise CheckpointError(f"{weight.name}: {error}") from None
    return Weight(weight.name, weight.shape, target, data)


def q8_0_blocks(scales: NDArray[np.float32], codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Blocks of Q8_0, uint8[blocks, 34], from scales[blocks, 1] and codes[blocks, 32]."""
    return np.concatenate([to_halves(scales), codes.view(np.uint8)], axis=1)


def _q8_0_rows(weight: Weight) -> NDArray[np.uint8]:
    scaled = _scaled(weight)
    if scaled is None or scaled[0].size * _GROUP != scaled[1].size:
        return quant_type("Q8_0").encode(weight.dequantize())
    scales, codes = scaled
    return q8_0_blocks(scales.reshape(-1, 1), codes.reshape(-1, _GROUP)).reshape(*weight.shape[:-1], -1)


def _scaled(weight: Weight) -> Scaled | None:
    """Scales and whole numbers of all blocks, where the encoding can be taken apart into these."""
    kind = weight.type
    split = getattr(import_module(kind.module), f"scaled_{kind.name.lower()}", None)
    if split is None:
        return None
    scaled: Scaled = split(np.ascontiguousarray(weight.data).reshape(-1, kind.block_bytes))
    return scaled
