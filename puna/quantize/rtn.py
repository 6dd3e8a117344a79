"""Rounding to the nearest of evenly spaced numbers, those of each group of columns spaced alike."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.errors import CheckpointError
from puna.tensor.groupwise import Grouped

Floats = NDArray[np.float32]


def round_to_nearest(values: Floats, bits: int, group_size: int, symmetric: bool) -> Grouped:
    """Of a matrix [rows, columns]; ``group_size`` columns share a scale (the last group may be smaller), or all of a
    row (-1). Raises CheckpointError for numbers whose scale float16 cannot hold.
    """
    rows, columns = values.shape
    groups = in_groups(values, group_size)
    scales, zeros = spacing(groups, bits, symmetric)
    codes = nearest_codes(groups, scales[..., None], zeros[..., None], bits).reshape(rows, -1)
    order = np.arange(columns) // groups.shape[2]
    return Grouped(np.ascontiguousarray(codes[:, :columns]), scales, zeros, order, bits)


def in_groups(values: Floats, group_size: int) -> Floats:
    """float32[rows, groups, columns of a group], the last group filled up with zeros, which change no spacing."""
    rows, columns = values.shape
    size = columns if group_size == -1 else group_size
    padded = np.zeros((rows, -(-columns // size) * size), np.float32)
    padded[:, :columns] = values
    return padded.reshape(rows, -1, size)


def spacing(groups: Floats, bits: int, symmetric: bool) -> tuple[Floats, NDArray[np.int16]]:
    """Scales (as float16 holds them) and zero points of float32[..., numbers]: those whose codes reach both ends.

    Symmetric codes stand for -2^(bits-1) … 2^(bits-1) - 1 steps. No zero point is 0, which GPTQ folders, storing it
    less 1, cannot tell from 2^bits: loaders disagree on what they read there, and some on the zero points beside it.
    """
    most = (1 << bits) - 1
    low, high = np.minimum(groups.min(axis=-1), 0), np.maximum(groups.max(axis=-1), 0)
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    with np.errstate(over="ignore"):  # refused with the scales
        scales = _as_half((high - low) / np.float32(most))
    if symmetric:
        return scales, np.full(scales.shape, 1 << (bits - 1), np.int16)
    zeros = np.clip(np.rint(-low / scales), 0, most)
    with np.errstate(over="ignore"):
        scales = np.where(zeros == 0, _as_half(high / np.float32(most - 1)), scales)
    return scales, np.maximum(zeros, 1).astype(np.int16)


def nearest_codes(values: Floats, scales: Floats, zeros: NDArray[np.int16], bits: int) -> NDArray[np.uint8]:
    codes: NDArray[np.uint8] = np.clip(np.rint(values / scales) + zeros, 0, (1 << bits) - 1).astype(np.uint8)
    return codes


def _as_half(scales: Floats) -> Floats:
    """Rounded to float16, and 1 for a group of zeros. Raises CheckpointError for what float16 cannot hold."""
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16).astype(np.float32)
    if not np.isfinite(halves).all():
        raise CheckpointError("a weight is infinite, not a number, or too large for a float16 scale")
    return np.where(halves == 0, np.float32(1), halves)
