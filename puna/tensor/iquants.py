"""The ggml encodings whose 4-bit codes look up a table of unevenly spaced levels: IQ4_NL and IQ4_XS.

Layouts and table: ggml's ``block_iq4_nl``, ``block_iq4_xs`` and ``kvalues_iq4nl`` (ggml-common.h).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.tensor.bits import as_half, halves, pack, reciprocals, to_halves, unpack
from puna.tensor.fit import level_fit

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32)


def decode_iq4_nl(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes: scale, 16 codes. w = d · level[code]."""
    return halves(blocks, 0) * LEVELS[unpack(blocks[:, 2:], 4, 16)]


def decode_iq4_xs(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Bytes: scale, 2 + 4 of high and low bits of eight scales, 128 codes. w = d · (scale - 32) · level[code]."""
    scales = unpack(blocks[:, 4:8], 4, 1) | unpack(blocks[:, 2:4], 2, 1) << 4
    factors = halves(blocks, 0) * (scales.astype(np.float32) - 32)
    levels = LEVELS[unpack(blocks[:, 8:], 4, 16)].reshape(len(blocks), 8, 32)
    return (levels * factors[..., None]).reshape(len(blocks), 256)


def encode_iq4_nl(values: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    weight = np.ones_like(values) if importance is None else importance
    scale = as_half(level_fit(values, weight, LEVELS)[:, None])
    return np.concatenate([to_halves(scale), pack(_codes(values * reciprocals(scale)), 4, 16)], axis=1)


def encode_iq4_xs(values: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
    x = values.reshape(-1, 32)
    weight = np.ones_like(x) if importance is None else importance.reshape(-1, 32)
    scales = level_fit(x, weight, LEVELS).reshape(len(values), 8)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)
    scale = as_half(largest / np.float32(-32))
    whole = np.clip(np.rint(scales * reciprocals(scale)), -32, 31)
    codes = _codes(x * reciprocals(scale * whole).reshape(-1, 1)).reshape(len(values), 256)
    stored = (whole + 32).astype(np.uint8)
    parts = [to_halves(scale), pack(stored >> 4, 2, 1), pack(stored & 15, 4, 1), pack(codes, 4, 16)]
    return np.concatenate(parts, axis=1)


def _codes(scaled: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest level's place."""
    middles = (LEVELS[1:] + LEVELS[:-1]) * np.float32(0.5)
    return np.searchsorted(middles, scaled).astype(np.uint8)
