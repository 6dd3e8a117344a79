"""4-bit NormalFloat with double quantization (Dettmers et al. 2023, QLoRA): blocks of numbers scaled to [-1, 1], each
rounded to one of 16 quantiles of the normal distribution; the blocks' scales rounded to 8 bits in their turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

BLOCK, NESTED_BLOCK = 64, 256

Floats = NDArray[np.float32]

# QLoRA, appendix E.
NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


@dataclass(frozen=True)
class DoubleQuantized:
    """``codes`` uint8[numbers] below 16; ``scales`` uint8[blocks], places in ``dynamic_levels()``: a block's scale is
    that level times its ``nested_scales``, float32[nested blocks], plus ``offset``.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    nested_scales: Floats
    offset: float


@cache
def dynamic_levels() -> Floats:
    """The 256 levels of dynamic 8-bit numbers (Dettmers 2015): 0, 1, and of both signs for each power of ten from
    10⁻⁶ to 1 twice as many even steps as for the one before.
    """
    positive: list[float] = []
    for place in range(7):
        edges = np.linspace(0.1, 1, 2**place + 1)
        positive += (10.0 ** (place - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
    return np.sort(np.array([0, 1, *positive, *(-x for x in positive)], np.float32))


def block_scales(scales: NDArray[np.uint8], levels: Floats, nested: Floats, offset: float, nested_block: int) -> Floats:
    """What the 8-bit scales stand for: float32[blocks]."""
    widths = np.repeat(nested, nested_block)[: len(scales)]
    values: Floats = levels[scales] * widths + np.float32(offset)
    return values


def quantize_nf4(values: Floats) -> DoubleQuantized:
    """Of float32[numbers], in blocks of 64 (the last may be shorter)."""
    filled = np.zeros(-(-len(values) // BLOCK) * BLOCK, np.float32)
    filled[: len(values)] = values
    blocks = filled.reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1)
    scaled = np.divide(blocks, largest[:, None], out=np.zeros_like(blocks), where=largest[:, None] > 0)
    codes = nearest(NF4_LEVELS, scaled).reshape(-1)[: len(values)]
    offset = np.float32(largest.mean())
    padded = np.zeros(-(-len(largest) // NESTED_BLOCK) * NESTED_BLOCK, np.float32)
    padded[: len(largest)] = largest - offset
    nested = np.abs(padded.reshape(-1, NESTED_BLOCK)).max(axis=1)
    relative = padded.reshape(-1, NESTED_BLOCK) / np.where(nested > 0, nested, np.float32(1))[:, None]
    scales = nearest(dynamic_levels(), relative).reshape(-1)[: len(largest)]
    return DoubleQuantized(codes, scales, nested, float(offset))


def nearest(levels: Floats, values: Floats) -> NDArray[np.uint8]:
    """The place of the level closest to each value, levels ascending."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, values).astype(np.uint8)
