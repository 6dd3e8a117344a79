"""The types of numbers that a key/value cache can hold, and what each makes of a number."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.errors import RequestError
from puna.tensor import QUANT_TYPES
from puna.tensor.types import QuantType

KV_TYPES = ("f16", "bf16", "q8_0", "f32")


def kv_quant_type(kv_type: str, head_dim: int) -> QuantType:
    """The encoding of a cache type. Raises RequestError for an unknown one, and for heads that are not whole blocks."""
    if kv_type not in KV_TYPES:
        raise RequestError(f"unknown kv_type {kv_type!r}; known: {', '.join(KV_TYPES)}")
    encoding = QUANT_TYPES[kv_type.upper()]
    if head_dim % encoding.block_size:
        raise RequestError(
            f"kv_type {kv_type} packs {encoding.block_size} numbers at a time, but this model's heads have {head_dim}; "
            "choose f16"
        )
    return encoding


def round_as(encoding: QuantType, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32[..., head_dim] as the cache gives them back.

    F16 and Q8_0 hold what is too large for them as their largest number. A NaN stays one; in Q8_0 it takes its block
    with it.
    """
    if encoding.name in ("F32", "BF16"):
        return encoding.decode(encoding.encode(x))
    largest = np.float32(65504 * (127 if encoding.name == "Q8_0" else 1))
    blocks = np.clip(x, -largest, largest).reshape(-1, encoding.block_size)
    broken = np.isnan(blocks).any(axis=1, keepdims=True)
    rounded = encoding.decode(encoding.encode(np.where(broken, np.float32(0), blocks)))
    return np.where(broken, np.float32(np.nan), rounded).reshape(x.shape)
