"""The ggml K-quants: 256 numbers a block, with quantized scales for each 16 or 32 of them.

Layouts: ggml's ``block_q*_K`` structures (ggml-common.h). The formulas are in each function.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.tensor.bits import halves, unpack

Blocks = NDArray[np.uint8]
Numbers = NDArray[np.float32]


def decode_q2_k(blocks: Blocks) -> Numbers:
    """Bytes: 16 scales and minima (4 + 4 bits), 64 codes, scale, minimum. w = d · scale · code - dmin · minimum."""
    scales = halves(blocks, 80) * (blocks[:, :16] & 15)
    minima = halves(blocks, 82) * (blocks[:, :16] >> 4)
    return _affine(unpack(blocks[:, 16:80], 2, 32), scales, minima)


def decode_q3_k(blocks: Blocks) -> Numbers:
    """Bytes: 32 high bits, 64 low bits, 12 scales, scale. w = d · (scale - 32) · (code - 4)."""
    codes = unpack(blocks[:, 32:96], 2, 32) | unpack(blocks[:, :32], 1, 32) << 2
    scales = unpack(blocks[:, 96:104], 4, 8) | unpack(blocks[:, 104:108], 2, 4) << 4
    return _scaled(codes.astype(np.float32) - 4, halves(blocks, 108) * (scales.astype(np.float32) - 32))


def decode_q4_k(blocks: Blocks) -> Numbers:
    """Bytes: scale, minimum, 12 scales and minima, 128 codes. w = d · scale · code - dmin · minimum."""
    return _affine(unpack(blocks[:, 16:], 4, 32), *_scales_and_minima(blocks))


def decode_q5_k(blocks: Blocks) -> Numbers:
    """As Q4_K, with 32 bytes of fifth bits before the codes."""
    codes = unpack(blocks[:, 48:], 4, 32) | unpack(blocks[:, 16:48], 1, 32) << 4
    return _affine(codes, *_scales_and_minima(blocks))


def decode_q6_k(blocks: Blocks) -> Numbers:
    """Bytes: 128 low bits, 64 high bits, 16 int8 scales, scale. w = d · scale · (code - 32)."""
    codes = unpack(blocks[:, :128], 4, 64) | unpack(blocks[:, 128:192], 2, 32) << 4
    return _scaled(codes.astype(np.float32) - 32, halves(blocks, 208) * blocks[:, 192:208].view(np.int8))


def decode_q8_k(blocks: Blocks) -> Numbers:
    """Bytes: float32 scale, 256 int8 codes, 16 int16 sums (not needed to decode). w = d · code."""
    scale = np.ascontiguousarray(blocks[:, :4]).view("<f4")
    return scale * blocks[:, 4:260].view(np.int8)


def _scales_and_minima(blocks: Blocks) -> tuple[Numbers, Numbers]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K, times their float16 factors: two of float32[blocks, 8].

    Twelve bytes: a[4] and b[4] hold scales and minima 0-3 in their low 6 bits; c[4] holds the low 4 bits of scales (low
    nibble) and minima (high nibble) 4-7, whose top 2 bits are the top 2 bits of a and b.
    """
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    minima = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)
    return halves(blocks, 0) * scales, halves(blocks, 2) * minima


def _scaled(codes: Numbers, scales: Numbers) -> Numbers:
    """codes[blocks, 256] times scales[blocks, G], each over 256 / G numbers; works in place."""
    grouped = codes.reshape(*scales.shape, -1)
    grouped *= scales[..., None]
    return codes


def _affine(codes: NDArray[np.integer], scales: Numbers, minima: Numbers) -> Numbers:
    numbers = codes.astype(np.float32)
    grouped = numbers.reshape(*scales.shape, -1)
    grouped *= scales[..., None]
    grouped -= minima[..., None]
    return numbers
