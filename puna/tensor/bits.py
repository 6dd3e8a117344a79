"""Small fields of bits inside bytes, in the one arrangement that every ggml encoding uses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from puna.errors import CheckpointError

Scaled = tuple[NDArray[np.float32], NDArray[np.int8]]  # scales [blocks, groups], codes [blocks, numbers]

_BEYOND = np.float32(1e8)  # 65504 times the largest scale and code of any type


def unpack(packed: NDArray[np.uint8], width: int, run: int) -> NDArray[np.uint8]:
    """Fields of ``width`` bits: uint8[blocks, bytes] -> uint8[blocks, bytes * 8 / width].

    Each run of ``run`` bytes holds 8 / width runs of fields, one byte contributing one field to each: first the lowest
    bits of every byte of the run, then the next higher bits, and so on.
    """
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields = packed.reshape(len(packed), -1, 1, run) >> shifts
    fields &= np.uint8((1 << width) - 1)
    return fields.reshape(len(packed), packed.shape[1] * len(shifts))


def pack(fields: NDArray[np.integer], width: int, run: int) -> NDArray[np.uint8]:
    """The inverse of unpack, for uint8 fields that are all less than 2 ** width."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    split = fields.reshape(len(fields), -1, len(shifts), run) << shifts
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(split, axis=2)
    return packed.reshape(len(fields), -1)


def multiply(scales: NDArray[np.float32], codes: NDArray[np.int8]) -> NDArray[np.float32]:
    """Each code times its group's scale: float32[blocks, numbers]."""
    grouped = codes.reshape(*scales.shape, -1)
    return (scales[..., None] * grouped).reshape(codes.shape)


def fields(packed: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Fields of ``width`` bits, those of one byte side by side, the lowest first: uint8[..., bytes * 8 / width]."""
    split: NDArray[np.uint8] = packed[..., None] >> np.arange(0, 8, width, dtype=np.uint8) & np.uint8((1 << width) - 1)
    return split.reshape(*packed.shape[:-1], -1)


def join(split: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The inverse of fields: uint8[..., bytes]."""
    grouped = split.reshape(*split.shape[:-1], -1, 8 // width) << np.arange(0, 8, width, dtype=np.uint8)
    joined: NDArray[np.uint8] = np.ascontiguousarray(np.bitwise_or.reduce(grouped, axis=-1))
    return joined


def halves(blocks: NDArray[np.uint8], at: int) -> NDArray[np.float32]:
    """The float16 at byte ``at`` of every block: float32[blocks, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def to_halves(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32[blocks, 1] -> float16 bytes [blocks, 2]. Raises CheckpointError for what float16 cannot hold."""
    with np.errstate(over="ignore"):
        stored = values.astype("<f2")
    if not np.isfinite(stored).all():
        raise _unstorable()
    return stored.view(np.uint8)


def check_storable(values: NDArray[np.float32]) -> None:
    """Raise CheckpointError for what is beyond any scale that float16 holds, before sums of squares overflow."""
    if not (np.abs(values) < _BEYOND).all():
        raise _unstorable()


def _unstorable() -> CheckpointError:
    return CheckpointError(
        "a weight is infinite, not a number, or too large for the float16 scale of a quantized block"
    )


def as_half(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """What float16 makes of them. Raises CheckpointError for what it cannot hold."""
    to_halves(values)
    rounded: NDArray[np.float32] = values.astype(np.float16).astype(np.float32)
    return rounded


def reciprocals(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / value, and 0 for 0."""
    inverse = np.zeros_like(values)
    np.divide(np.float32(1), values, out=inverse, where=values != 0)
    return inverse
