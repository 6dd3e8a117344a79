"""The ggml K-quants: 256 numbers a block, with quantized scales for each 16 or 32 of them.

Layouts: ggml's ``block_q*_K`` structures (ggml-common.h). The formulas are in each function. Encoders take the
importance of each number's error, of the numbers' shape; None for all the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.tensor.bits import as_half, halves, pack, reciprocals, to_halves, unpack
from puna.tensor.fit import affine_fit, divide, sum_in_order, symmetric_fit, whole_fit

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


def encode_q2_k(values: Numbers, importance: Numbers | None = None) -> Blocks:
    scale, low, scales, minima, codes = _affine_blocks(values, importance, 16, steps=3, most=15)
    packed = pack(codes, 2, 32)
    return np.concatenate([scales | minima << 4, packed, to_halves(scale), to_halves(low)], axis=1)


def encode_q3_k(values: Numbers, importance: Numbers | None = None) -> Blocks:
    scale, scales, codes = _symmetric_blocks(values, importance, half=4, most=32)
    stored = (scales + 32).astype(np.uint8)
    packed = [pack(codes >> 2, 1, 32), pack(codes & 3, 2, 32), pack(stored & 15, 4, 8), pack(stored >> 4, 2, 4)]
    return np.concatenate([*packed, to_halves(scale)], axis=1)


def encode_q4_k(values: Numbers, importance: Numbers | None = None) -> Blocks:
    scale, low, scales, minima, codes = _affine_blocks(values, importance, 32, steps=15, most=63)
    head = [to_halves(scale), to_halves(low), _pack_scales_and_minima(scales, minima)]
    return np.concatenate([*head, pack(codes, 4, 32)], axis=1)


def encode_q5_k(values: Numbers, importance: Numbers | None = None) -> Blocks:
    scale, low, scales, minima, codes = _affine_blocks(values, importance, 32, steps=31, most=63)
    head = [to_halves(scale), to_halves(low), _pack_scales_and_minima(scales, minima)]
    return np.concatenate([*head, pack(codes >> 4, 1, 32), pack(codes & 15, 4, 32)], axis=1)


def encode_q6_k(values: Numbers, importance: Numbers | None = None) -> Blocks:
    scale, scales, codes = _symmetric_blocks(values, importance, half=32, most=128)
    packed = [pack(codes & 15, 4, 64), pack(codes >> 4, 2, 32), scales.astype(np.int8).view(np.uint8)]
    return np.concatenate([*packed, to_halves(scale)], axis=1)


def _affine_blocks(
    values: Numbers, importance: Numbers | None, group: int, *, steps: int, most: int
) -> tuple[Numbers, Numbers, Blocks, Blocks, Blocks]:
    """The float16 factors [blocks, 1] of scales and minima, both as whole numbers up to ``most`` [blocks, groups], and
    the codes [blocks, 256]."""
    x, weight = _groups(values, group), _groups(np.ones_like(values) if importance is None else importance, group)
    scales, minima = (fitted.reshape(len(values), -1) for fitted in affine_fit(x, weight, steps))
    # An error of a scale counts by the squared numbers that it multiplies, one of a minimum by how many there are.
    spread = divide(sum_in_order(weight * x * x).reshape(scales.shape), scales * scales)
    scale, whole_scales = _whole(scales, spread, most)
    low, whole_minima = _whole(minima, sum_in_order(weight).reshape(minima.shape), most)
    factors, offsets = scale * whole_scales, low * whole_minima
    codes = np.rint((x + offsets.reshape(-1, 1)) * reciprocals(factors).reshape(-1, 1))
    codes = np.clip(codes, 0, steps).astype(np.uint8).reshape(len(values), 256)
    return scale, low, whole_scales.astype(np.uint8), whole_minima.astype(np.uint8), codes


def _symmetric_blocks(
    values: Numbers, importance: Numbers | None, *, half: int, most: int
) -> tuple[Numbers, NDArray[np.int8], Blocks]:
    """The float16 factor [blocks, 1], scales as whole numbers from ``-most`` to ``most - 1`` [blocks, 16], codes."""
    x, weight = _groups(values, 16), _groups(np.ones_like(values) if importance is None else importance, 16)
    scales = symmetric_fit(x, weight, half).reshape(len(values), -1)
    largest = np.take_along_axis(scales, np.abs(scales).argmax(axis=1)[:, None], axis=1)
    scale = as_half(largest / np.float32(-most))
    whole = np.clip(np.rint(scales * reciprocals(scale)), -most, most - 1)
    codes = np.rint(x * reciprocals(scale * whole).reshape(-1, 1))
    codes = (np.clip(codes, -half, half - 1) + half).astype(np.uint8).reshape(len(values), 256)
    return scale, whole.astype(np.int8), codes


def _whole(numbers: Numbers, weight: Numbers, most: int) -> tuple[Numbers, Numbers]:
    """Numbers >= 0 as whole multiples, up to ``most``, of a float16 factor of their block."""
    factor = as_half(whole_fit(numbers, weight, most)[:, None])
    return factor, np.clip(np.rint(numbers * reciprocals(factor)), 0, most)


def _pack_scales_and_minima(scales: Blocks, minima: Blocks) -> Blocks:
    """The inverse of ``_scales_and_minima``: two of uint8[blocks, 8] -> uint8[blocks, 12]."""
    a = scales[:, :4] | scales[:, 4:] >> 4 << 6
    b = minima[:, :4] | minima[:, 4:] >> 4 << 6
    return np.concatenate([a, b, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], axis=1)


def _groups(values: Numbers, size: int) -> Numbers:
    return values.reshape(-1, size)
