"""8-bit floats E4M3 as machine learning uses them: no infinities, 448 the largest (OCP 8-bit Floating Point, 1.0)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LARGEST = np.float32(448)


def _positive() -> NDArray[np.float32]:
    """What the bytes 0 to 126 stand for, ascending."""
    code = np.arange(127)
    exponent, fraction = code >> 3, code & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return np.where(exponent > 0, normal, fraction / 8 * 2.0**-6).astype(np.float32)


_POSITIVE = _positive()
_VALUES = np.concatenate([_POSITIVE, [np.float32(np.nan)], -_POSITIVE, [np.float32(np.nan)]])
_MIDDLES = (_POSITIVE[1:] + _POSITIVE[:-1]) / 2


def decode_e4m3(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = _VALUES[codes]
    return numbers


def encode_e4m3(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """To the nearest, ties to the even code; what is beyond 448 becomes 448."""
    magnitude = np.abs(values)
    code = np.searchsorted(_MIDDLES, magnitude)
    tie = (code < len(_MIDDLES)) & (magnitude == _MIDDLES[np.minimum(code, len(_MIDDLES) - 1)])
    code = code + (tie & (code % 2 == 1))
    code = np.where(np.isnan(values), 127, code)
    return (code | np.signbit(values) << 7).astype(np.uint8)
