"""Matrices as whole numbers with a scale and a zero point for each group of a row: what AWQ, GPTQ, compressed-tensors
and plain rounding all hold, whatever the layout of their files.

Computing needs no encoding of its own: groups are split into blocks of 32 that repeat their scale, which are those of
Q4_0, Q4_1 or Q8_0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from puna.errors import CheckpointError
from puna.tensor.bits import pack, to_halves
from puna.tensor.types import QuantType, quant_type
from puna.tensor.weight import Weight

_BLOCK = 32
_NUMBERS_AT_ONCE = 1 << 22

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Grouped:
    """w[r, c] = scales[r, g] · (codes[r, c] - zeros[r, g]), g = groups[c].

    ``codes`` is uint8[rows, columns] of numbers below 2 ** ``bits``, ``scales`` float32 and ``zeros`` int16
    [rows, number of groups]; ``groups``, intp[columns], says which group a column belongs to.
    """

    codes: NDArray[np.uint8]
    scales: Floats
    zeros: NDArray[np.int16]
    groups: NDArray[np.intp]
    bits: int

    def __post_init__(self) -> None:
        assert self.codes.ndim == 2
        assert self.scales.shape == self.zeros.shape == (len(self.codes), self.scales.shape[1])
        assert len(self.groups) == self.codes.shape[1]

    @property
    def in_order(self) -> bool:
        """Whether groups are runs of equally many columns, one after the other."""
        return np.array_equal(self.groups, consecutive_groups(len(self.groups), self.scales.shape[1]))

    def dequantize(self, rows: slice = slice(None)) -> Floats:
        """The numbers of some rows: float32[rows, columns]."""
        zeros, scales = self.zeros[rows][:, self.groups], self.scales[rows][:, self.groups]
        numbers: Floats = (self.codes[rows].astype(np.int16) - zeros).astype(np.float32)
        numbers *= scales
        return numbers

    def as_weight(self, name: str) -> Weight:
        """A weight that every backend computes with.

        4 bits and fewer become Q4_0 (exact) where every zero point is 8, else Q4_1, whose minimum is rounded to float16
        (an error of at most 2⁻¹¹ · 15 steps); 8 bits become Q8_0 (exact) where code - zero point fits int8. Where a
        block of 32 columns spans several groups, as with GPTQ's act-order, the numbers are encoded anew as Q8_0; where
        float16 cannot hold the scales, or rows are not whole blocks, as BF16.
        """
        shape = (len(self.codes), len(self.groups))
        kind = grouped_type(self.scales, self.zeros, self.groups, self.bits)
        starts = self.groups[::_BLOCK]
        if kind.name == "BF16" or not np.array_equal(np.repeat(starts, _BLOCK), self.groups):
            return encode_rows(name, shape, kind.name, self.dequantize)
        scales, zeros = self.scales[:, starts].reshape(-1, 1), self.zeros[:, starts].reshape(-1, 1)
        codes = self.codes.reshape(-1, _BLOCK)
        if self.bits <= 4:
            parts = [to_halves(scales), pack(codes, 4, 16)]
            if kind.name == "Q4_1":
                parts.insert(1, to_halves(scales * -zeros.astype(np.float32)))
        else:
            shifted = codes.astype(np.int16) - zeros
            if shifted.min(initial=0) < -128 or shifted.max(initial=0) > 127:
                return encode_rows(name, shape, "Q8_0", self.dequantize)
            parts = [to_halves(scales), shifted.astype(np.int8).view(np.uint8)]
        return Weight(name, shape, kind, np.concatenate(parts, axis=1).reshape(shape[0], -1))


def grouped_type(scales: Floats, zeros: NDArray[np.int16], groups: NDArray[np.intp], bits: int) -> QuantType:
    """The type of ``Grouped.as_weight``, which the codes do not change."""
    if len(groups) % _BLOCK or not _half_holds(scales):
        return quant_type("BF16")
    starts = groups[::_BLOCK]
    if bits > 4 or not np.array_equal(np.repeat(starts, _BLOCK), groups):
        return quant_type("Q8_0")
    return quant_type("Q4_0" if (zeros[:, starts] == 8).all() else "Q4_1")


def consecutive_groups(columns: int, groups: int) -> NDArray[np.intp]:
    """The group of each column where ``groups`` equal runs make up a row, the last perhaps shorter."""
    size = -(-columns // max(1, groups))
    order: NDArray[np.intp] = np.arange(columns) // max(1, size)
    return order


def encode_rows(name: str, shape: tuple[int, int], type_name: str, rows: Callable[[slice], Floats]) -> Weight:
    """A weight of numbers that are made some rows at a time, so that they are never all held as float32.

    Raises CheckpointError naming the tensor where the type cannot hold a number; BF16 stands in for a type whose blocks
    do not fit a row.
    """
    kind = rows_type(shape[1], type_name)
    data = np.empty((shape[0], kind.row_bytes(shape[1])), np.uint8)
    step = max(1, _NUMBERS_AT_ONCE // max(1, shape[1]))
    for start in range(0, shape[0], step):
        piece = slice(start, start + step)
        try:
            data[piece] = kind.encode(rows(piece))
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
    return Weight(name, shape, kind, data)


def rows_type(columns: int, type_name: str) -> QuantType:
    """The type of ``encode_rows``."""
    kind = quant_type(type_name)
    return quant_type("BF16") if columns % kind.block_size else kind


def _half_holds(scales: Floats) -> bool:
    """Whether rounding to float16 changes no scale by more than a thousandth of itself, or of the mean scale: one that
    is too small for float16 belongs to numbers that hardly count beside the others."""
    size = np.abs(scales)
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs(size.astype(np.float16).astype(np.float32) - size)
        return bool((error <= np.maximum(size, size.mean()) * 2.0**-10).all())
