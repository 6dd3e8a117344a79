"""The ggml encodings with one scale for 32 numbers: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

A block is: float16 scale; float16 minimum (the ``_1`` types); 32 fifth bits (the Q5 types); 32 low bits or bytes.
Layouts and rounding: ggml's ``block_q*`` structures and reference quantizers (ggml-common.h, ggml-quants.c). With the
importance of each number's error (of the numbers' shape), the scales are those that lose least.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.tensor.bits import as_half, halves, pack, reciprocals, to_halves, unpack
from puna.tensor.fit import affine_fit, symmetric_fit

Blocks = NDArray[np.uint8]
Numbers = NDArray[np.float32]


def decode_q4_0(blocks: Blocks) -> Numbers:
    return halves(blocks, 0) * (unpack(blocks[:, 2:], 4, 16).astype(np.float32) - 8)


def decode_q4_1(blocks: Blocks) -> Numbers:
    return halves(blocks, 0) * unpack(blocks[:, 4:], 4, 16) + halves(blocks, 2)


def decode_q5_0(blocks: Blocks) -> Numbers:
    codes = unpack(blocks[:, 6:], 4, 16) | unpack(blocks[:, 2:6], 1, 1) << 4
    return halves(blocks, 0) * (codes.astype(np.float32) - 16)


def decode_q5_1(blocks: Blocks) -> Numbers:
    codes = unpack(blocks[:, 8:], 4, 16) | unpack(blocks[:, 4:8], 1, 1) << 4
    return halves(blocks, 0) * codes + halves(blocks, 2)


def decode_q8_0(blocks: Blocks) -> Numbers:
    return halves(blocks, 0) * blocks[:, 2:].view(np.int8)


def encode_q4_0(values: Numbers, importance: Numbers | None = None) -> Blocks:
    scale, codes = _symmetric(values, 8, importance)
    return np.concatenate([to_halves(scale), pack(codes, 4, 16)], axis=1)


def encode_q4_1(values: Numbers, importance: Numbers | None = None) -> Blocks:
    scale, low, codes = _affine(values, 15, importance)
    return np.concatenate([to_halves(scale), to_halves(low), pack(codes, 4, 16)], axis=1)


def encode_q5_0(values: Numbers, importance: Numbers | None = None) -> Blocks:
    scale, codes = _symmetric(values, 16, importance)
    return np.concatenate([to_halves(scale), pack(codes >> 4, 1, 1), pack(codes & 15, 4, 16)], axis=1)


def encode_q5_1(values: Numbers, importance: Numbers | None = None) -> Blocks:
    scale, low, codes = _affine(values, 31, importance)
    return np.concatenate([to_halves(scale), to_halves(low), pack(codes >> 4, 1, 1), pack(codes & 15, 4, 16)], axis=1)


def encode_q8_0(values: Numbers) -> Blocks:
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(127)
    stored = to_halves(scale)
    scaled = values * _reciprocal(scale)
    codes = np.trunc(scaled)
    codes += np.trunc(2 * (scaled - codes))  # halves away from zero, as C's roundf
    return np.concatenate([stored, codes.astype(np.int8).view(np.uint8)], axis=1)


def _symmetric(values: Numbers, half: int, importance: Numbers | None) -> tuple[Numbers, NDArray[np.uint8]]:
    """Scale and codes so that the number of largest magnitude, whatever its sign, gets code 0 exactly; or, with
    ``importance``, those of the least weighted error."""
    if importance is not None:
        scale = as_half(symmetric_fit(values, importance, half)[:, None])
        codes = np.clip(np.rint(values * reciprocals(scale)), -half, half - 1) + half
        return scale, codes.astype(np.uint8)
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / np.float32(-half)
    to_halves(scale)  # refuse what has no finite code before computing with it
    codes = values * _reciprocal(scale) + np.float32(half + 0.5)
    return scale, np.minimum(codes, np.float32(2 * half - 1)).astype(np.uint8)


def _affine(values: Numbers, steps: int, importance: Numbers | None) -> tuple[Numbers, Numbers, NDArray[np.uint8]]:
    """Scale, minimum and codes so that the smallest number gets code 0 and the largest code ``steps``; or, with
    ``importance``, those of the least weighted error."""
    if importance is not None:
        shift = np.maximum(values.min(axis=1, keepdims=True), 0)  # the fit's minimum is at most 0
        scale, offset = affine_fit(values - shift, importance, steps)
        scale, low = as_half(scale[:, None]), as_half(shift - offset[:, None])
        codes = np.clip(np.rint((values - low) * reciprocals(scale)), 0, steps)
        return scale, low, codes.astype(np.uint8)
    low = values.min(axis=1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (values.max(axis=1, keepdims=True) - low) / np.float32(steps)
    to_halves(scale)
    codes = (values - low) * _reciprocal(scale) + np.float32(0.5)
    return scale, low, np.minimum(codes, np.float32(steps)).astype(np.uint8)


def _reciprocal(scale: Numbers) -> Numbers:
    """1 / scale, and 0 where that overflows (the float16 scale is then 0 too, and the codes do not matter)."""
    inverse = np.zeros_like(scale)
    np.divide(np.float32(1), scale, out=inverse, where=np.abs(scale) >= np.finfo(np.float32).tiny)
    return inverse
