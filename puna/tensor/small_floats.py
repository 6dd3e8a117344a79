"""The ggml encodings of ternary numbers (TQ1_0, TQ2_0) and of 4-bit floats (MXFP4), taken apart as in codebook_quants.

Layouts: ggml's ``block_tq1_0``, ``block_tq2_0`` and ``block_mxfp4`` (ggml-common.h); the floats are those of the OCP
Microscaling Formats specification 1.0.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.tensor.bits import Scaled, halves, multiply, unpack

Blocks = NDArray[np.uint8]
Numbers = NDArray[np.float32]

# E2M1 values, doubled, so that they are whole.
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def scaled_tq1_0(blocks: Blocks) -> Scaled:
    """Bytes: 48 of five ternary digits each, 4 of four, scale. A byte's digits are the base-3 digits of byte / 256."""
    runs = (blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)
    digits = []
    for packed, count in runs:
        turned = packed[:, None, :] * np.array([1, 3, 9, 27, 81], np.uint8)[:count, None]  # modulo 256
        digits.append((turned.astype(np.uint16) * 3 >> 8).reshape(len(blocks), -1))
    return _one_scale(halves(blocks, 52)), np.concatenate(digits, axis=1).astype(np.int8) - np.int8(1)


def scaled_tq2_0(blocks: Blocks) -> Scaled:
    """Bytes: 64 of four codes, scale."""
    return _one_scale(halves(blocks, 64)), unpack(blocks[:, :64], 2, 32).astype(np.int8) - np.int8(1)


def scaled_mxfp4(blocks: Blocks) -> Scaled:
    """Bytes: the exponent of a power of two, with a bias of 127; 16 of codes."""
    exponent = blocks[:, :1].astype(np.int32) - 128  # one less, for the codes are doubled
    return np.ldexp(np.float32(1), exponent), _E2M1[unpack(blocks[:, 1:], 4, 16)]


def decode_tq1_0(blocks: Blocks) -> Numbers:
    return multiply(*scaled_tq1_0(blocks))


def decode_tq2_0(blocks: Blocks) -> Numbers:
    return multiply(*scaled_tq2_0(blocks))


def decode_mxfp4(blocks: Blocks) -> Numbers:
    return multiply(*scaled_mxfp4(blocks))


def _one_scale(scale: Numbers) -> Numbers:
    """The same for each 32 of a block's 256 numbers."""
    return np.repeat(scale, 8, axis=1)
