"""Weights in other encodings, some rows at a time, by the fastest encoders there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from puna.errors import CheckpointError
from puna.ops.protocol import Ops
from puna.tensor import QuantType, Weight

Encode = Callable[[QuantType, NDArray[np.float32], NDArray[np.float32] | None], NDArray[np.uint8]]

_NUMBERS_AT_ONCE = 1 << 22


def encoder(ops: Ops) -> Encode:
    """The native encoders where they were built; they give the same bytes as the others."""
    if ops.name != "native":
        return lambda kind, values, importance: kind.encode(values, importance)
    from puna.ops.native_ops import NativeOps  # the extension is there

    assert isinstance(ops, NativeOps)
    return ops.encode


def encode_pieces(
    weight: Weight, kind: QuantType, encode: Encode, importance: NDArray[np.float32] | None
) -> Iterator[NDArray[np.uint8]]:
    """The bytes of ``weight`` as ``kind``, in order. Raises CheckpointError where that cannot hold a number."""
    if weight.type == kind and kind.block_size > 1:
        yield weight.data
        return
    rows = weight.shape[0] if len(weight.shape) == 1 else max(1, _NUMBERS_AT_ONCE // weight.shape[-1])
    for start in range(0, weight.shape[0], rows):
        values = (weight if rows >= weight.shape[0] else weight.take_rows(slice(start, start + rows))).dequantize()
        if kind.block_size > 1:
            yield encode(kind, values, importance)
        elif np.isfinite(values).all():
            yield kind.encode(values)
        else:
            raise CheckpointError("a weight is infinite or not a number")


def encode_weight(weight: Weight, kind: QuantType, encode: Encode, importance: NDArray[np.float32] | None) -> Weight:
    """``weight`` as ``kind``, in memory. Raises as ``encode_pieces``."""
    data = np.concatenate(list(encode_pieces(weight, kind, encode, importance)))
    return Weight(weight.name, weight.shape, kind, data)
