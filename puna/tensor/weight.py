"""A weight: named numbers in some encoding, usually a view into a memory-mapped file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from puna.errors import CheckpointError
from puna.tensor.types import QuantType, quant_type


@dataclass(frozen=True)
class Weight:
    """One tensor of a model, still encoded.

    ``shape`` is in numbers, outermost first: a linear layer is ``(rows = outputs, columns = inputs)``, a norm ``(n,)``.
    ``data`` is uint8 of shape ``(*shape[:-1], type.row_bytes(shape[-1]))``, C-contiguous, read-only when mapped.
    """

    name: str
    shape: tuple[int, ...]
    type: QuantType
    data: NDArray[np.uint8]

    def __post_init__(self) -> None:
        expected = (*self.shape[:-1], self.type.row_bytes(self.shape[-1]))
        if self.data.dtype != np.uint8 or self.data.shape != expected:
            raise CheckpointError(
                f"{self.name}: {self.type.name} of shape {self.shape} needs uint8 data of shape {expected}, "
                f"found {self.data.dtype} {self.data.shape}"
            )

    @classmethod
    def from_array(cls, name: str, values: NDArray[np.floating], type_name: str = "F32") -> Weight:
        """Encode a float array. Raises CheckpointError when the type has no encoder or the row length does not fit."""
        kind = quant_type(type_name)
        return cls(name, tuple(values.shape), kind, kind.encode(np.asarray(values, dtype=np.float32)))

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])

    def dequantize(self) -> NDArray[np.float32]:
        """The numbers as float32 of ``shape``."""
        return self.type.decode(self.data).reshape(self.shape)

    def take_rows(self, index: slice | Sequence[int] | NDArray[np.integer]) -> Weight:
        """Some rows (first axis), still encoded: no precision is lost and only those rows are read.

        Raises CheckpointError for a vector of a quantized type, whose numbers cannot be taken apart.
        """
        if len(self.shape) > 1:
            data = self.data[index]
            return Weight(self.name, (data.shape[0], *self.shape[1:]), self.type, data)
        if self.type.block_size > 1:
            raise CheckpointError(f"{self.name}: single numbers of a {self.type.name} vector cannot be taken")
        numbers = self.data.reshape(-1, self.type.block_bytes)[index]
        return Weight(self.name, (len(numbers),), self.type, numbers.reshape(-1))

    def rename(self, name: str) -> Weight:
        return Weight(name, self.shape, self.type, self.data)


class DeferredWeight(Weight):
    """A weight that is made when its ``data`` is first asked for, and known by name, shape and type before."""

    make: Callable[[], NDArray[np.uint8]]

    def __init__(
        self, name: str, shape: tuple[int, ...], kind: QuantType, make: Callable[[], NDArray[np.uint8]]
    ) -> None:
        """``make`` gives the ``data``."""
        self.__dict__.update(name=name, shape=shape, type=kind, make=make)

    @cached_property
    def data(self) -> NDArray[np.uint8]:
        return Weight(self.name, self.shape, self.type, self.make()).data

    def rename(self, name: str) -> Weight:
        return DeferredWeight(name, self.shape, self.type, lambda: self.data)
