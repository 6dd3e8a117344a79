"""Scales that lose least: for each group of numbers those whose rounded codes have the least squared error.

Several scales near the obvious one are tried; for the codes that each gives, the best scale and minimum follow from
least squares. Sums run over a group's numbers in order, in float32 and without fused operations, so that the native
encoders (csrc/fits.hpp) give the same bytes.

Shapes: ``x`` is float32[groups, numbers]; ``weight``, the importance of each number's error, is of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from puna.tensor.bits import check_storable

Numbers = NDArray[np.float32]

# By how much others than the obvious code of the largest number are tried.
AFFINE_TRIALS = np.arange(-10, 11, dtype=np.float32) * np.float32(0.1)
SYMMETRIC_TRIALS = np.arange(-9, 10, dtype=np.float32) * np.float32(0.1)
LEVEL_TRIALS = np.arange(-10, 11, dtype=np.float32) * np.float32(1.5)
WHOLE_TRIALS = np.arange(-10, 11, dtype=np.float32) * np.float32(0.1)
_TINY = np.float32(1e-30)


def affine_fit(x: Numbers, weight: Numbers, steps: int) -> tuple[Numbers, Numbers]:
    """Scale and minimum of each group, both >= 0: x ≈ scale · code - minimum, code from 0 to ``steps``."""
    check_storable(x)
    zero = np.float32(0)
    low = np.minimum(x.min(axis=1), zero)
    span = x.max(axis=1) - low
    total, first, second = sum_in_order(weight), sum_in_order(weight * x), sum_in_order(weight * x * x)
    best_scale, best_low = np.zeros_like(low), low.copy()
    best_error = _affine_error(total, first, second, zero, zero, zero, best_scale, best_low)
    for trial in AFFINE_TRIALS:
        inverse = divide(np.float32(steps) + trial, span)
        codes = np.clip(np.rint((x - low[:, None]) * inverse[:, None]), zero, np.float32(steps))
        weighted = weight * codes
        q, qq, qx = sum_in_order(weighted), sum_in_order(weighted * codes), sum_in_order(weighted * x)
        determinant = total * qq - q * q
        scale = divide(total * qx - first * q, determinant)
        new_low = divide(qq * first - q * qx, determinant)
        above = new_low > zero
        scale = np.where(above, divide(qx, qq), scale)
        new_low = np.where(above, zero, new_low)
        error = _affine_error(total, first, second, q, qq, qx, scale, new_low)
        better = (determinant > _TINY) & (scale > zero) & (error < best_error)
        best_scale, best_low = np.where(better, scale, best_scale), np.where(better, new_low, best_low)
        best_error = np.where(better, error, best_error)
    return best_scale, -best_low


def symmetric_fit(x: Numbers, weight: Numbers, half: int) -> Numbers:
    """Scale of each group, of either sign: x ≈ scale · code, code from ``-half`` to ``half - 1``."""
    check_storable(x)

    def codes_of(scaled: Numbers) -> Numbers:
        return np.clip(np.rint(scaled), np.float32(-half), np.float32(half - 1))

    return _signed_fit(x, weight, np.float32(-half) - SYMMETRIC_TRIALS, codes_of)


def level_fit(x: Numbers, importance: Numbers, levels: Numbers) -> Numbers:
    """Scale of each group, of either sign: x ≈ scale · level, the levels ascending.

    Errors count by importance · √(2 mean(x²) + x²), which llama.cpp takes too: more where numbers are large. The
    largest number is tried at either end, for the levels are not symmetric.
    """
    check_storable(x)
    middles = (levels[1:] + levels[:-1]) * np.float32(0.5)

    def codes_of(scaled: Numbers) -> Numbers:
        codes: Numbers = levels[np.searchsorted(middles, scaled)]
        return codes

    squares = x * x
    weight = importance * np.sqrt((sum_in_order(squares) * np.float32(2 / x.shape[1]))[:, None] + squares)
    return _signed_fit(x, weight, np.concatenate([levels[0] - LEVEL_TRIALS, levels[-1] - LEVEL_TRIALS]), codes_of)


def whole_fit(x: Numbers, weight: Numbers, most: int) -> Numbers:
    """Scale of each group, x >= 0: x ≈ scale · code, code from 0 to ``most``."""
    check_storable(x)

    def codes_of(scaled: Numbers) -> Numbers:
        return np.clip(np.rint(scaled), np.float32(0), np.float32(most))

    return _signed_fit(x, weight, np.float32(most) - WHOLE_TRIALS, codes_of)


def _signed_fit(x: Numbers, weight: Numbers, ends: Numbers, codes_of: Callable[[Numbers], Numbers]) -> Numbers:
    """The scale by which ``codes_of(x / scale)`` explains most; the largest magnitude gets about code ``ends[i]``."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    best_scale, best_gain = np.zeros_like(largest), np.zeros_like(largest)
    for end in ends:
        inverse = divide(end, largest)
        codes = codes_of(x * inverse[:, None])
        weighted = weight * codes
        qx, qq = sum_in_order(weighted * x), sum_in_order(weighted * codes)
        scale = divide(qx, qq)
        gain = scale * qx
        better = gain > best_gain
        best_scale, best_gain = np.where(better, scale, best_scale), np.where(better, gain, best_gain)
    return best_scale


def _affine_error(
    total: Numbers, first: Numbers, second: Numbers, q: Numbers, qq: Numbers, qx: Numbers, scale: Numbers, low: Numbers
) -> Numbers:
    """Σ w (x - scale · q - low)², from the sums of w, w x, w x², w q, w q², w q x."""
    two = np.float32(2)
    linear: Numbers = scale * qx + low * first
    square: Numbers = scale * scale * qq + scale * low * q * two + low * low * total
    return np.asarray(second - linear * two + square, np.float32)


def sum_in_order(values: Numbers) -> Numbers:
    """Along each group: float32[groups, numbers] -> float32[groups]."""
    result: Numbers = np.zeros(len(values), np.float32)
    for column in values.T:
        result += column
    return result


def divide(numerator: Numbers | np.float32, denominator: Numbers) -> Numbers:
    """0 where the denominator is too small to divide by."""
    result = np.zeros_like(denominator)
    np.divide(numerator, denominator, out=result, where=np.abs(denominator) > _TINY)
    return result
