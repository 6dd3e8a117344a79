"""The ggml encodings whose 4-bit codes look up a table of unevenly spaced levels: IQ4_NL and IQ4_XS.

Layouts and table: ggml's ``block_iq4_nl``, ``block_iq4_xs`` and ``kvalues_iq4nl`` (ggml-common.h).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.tensor.bits import halves, unpack

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
