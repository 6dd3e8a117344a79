"""Weights re-encoded as plain floats while they stream into a file, and compared, without a whole one in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from puna.errors import CheckpointError
from puna.tensor import QuantType, Weight, quant_type

FLOAT_TYPES = ("F32", "F16", "BF16")
_CHUNK_NUMBERS = 1 << 22
_COMPARE_BYTES = 1 << 24


def float_type(weight: Weight, weight_type: str | None) -> QuantType:
    """The type a float-only format stores ``weight`` as.

    Matrices follow ``weight_type``; where it is None, and for vectors, floats stay and others become F16.
    Raises CheckpointError when ``weight_type`` is not a float type.
    """
    if weight_type is not None and weight_type.upper() not in FLOAT_TYPES:
        raise CheckpointError(
            f"this format holds only {', '.join(FLOAT_TYPES)}, not {weight_type}; "
            "convert to a .gguf file for quantized weights"
        )
    if weight_type is not None and len(weight.shape) > 1:
        return quant_type(weight_type)
    return weight.type if weight.type.name in FLOAT_TYPES else quant_type("F16")


def encoded_pieces(weight: Weight, kind: QuantType) -> Iterator[NDArray[np.uint8]]:
    """The bytes of ``weight`` as ``kind``, some rows at a time, so that no whole tensor is held as float32."""
    if weight.type == kind:
        yield weight.data
        return
    if len(weight.shape) == 1:
        yield kind.encode(weight.dequantize())
        return
    rows = max(1, _CHUNK_NUMBERS // max(1, int(np.prod(weight.shape[1:]))))
    for start in range(0, weight.shape[0], rows):
        yield kind.encode(weight.take_rows(slice(start, start + rows)).dequantize())


def equal_bytes(one: Weight, other: Weight) -> bool:
    """Whether two weights are stored identically; compared piecewise, for they may be larger than memory."""
    if one.type != other.type or one.shape != other.shape:
        return False
    rows = max(1, _COMPARE_BYTES // max(1, one.nbytes // max(1, one.data.shape[0])))
    return all(
        np.array_equal(one.data[start : start + rows], other.data[start : start + rows])
        for start in range(0, one.data.shape[0], rows)
    )
