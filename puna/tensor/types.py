"""The table of weight encodings: how a block of numbers is packed into bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np
from numpy.typing import NDArray

from puna.errors import CheckpointError

Codec = Callable[[NDArray], NDArray]


@dataclass(frozen=True)
class QuantType:
    """One encoding of numbers.

    ``block_size`` consecutive numbers of a row occupy ``block_bytes`` bytes. ``gguf_id`` is the type's number in
    GGUF files. ``module`` holds ``decode_<name>(uint8[blocks, block_bytes]) -> float32[blocks, block_size]`` and,
    where the type can be written, ``encode_<name>(float32[blocks, block_size]) -> uint8[blocks, block_bytes]``.
    """

    name: str
    block_size: int
    block_bytes: int
    gguf_id: int
    module: str

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of ``columns`` numbers. Raises CheckpointError when no whole number of blocks fits."""
        if columns % self.block_size:
            raise CheckpointError(
                f"a row of {columns} numbers cannot be stored as {self.name}, which packs {self.block_size} at a time"
            )
        return columns // self.block_size * self.block_bytes

    def decode(self, data: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8[..., row_bytes] -> float32[..., columns]."""
        blocks = np.ascontiguousarray(data).reshape(-1, self.block_bytes)
        return self._codec("decode")(blocks).reshape(*data.shape[:-1], -1)

    def encode(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        """float32[..., columns] -> uint8[..., row_bytes]. Raises CheckpointError where no encoder exists."""
        row_bytes = self.row_bytes(values.shape[-1])
        blocks = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, self.block_size)
        return self._codec("encode")(blocks).reshape(*values.shape[:-1], row_bytes)

    @property
    def can_encode(self) -> bool:
        return hasattr(import_module(self.module), f"encode_{self.name.lower()}")

    def _codec(self, direction: str) -> Codec:
        codec: Codec | None = getattr(import_module(self.module), f"{direction}_{self.name.lower()}", None)
        if codec is None:
            raise CheckpointError(f"{self.name} can be read but not written; choose another type")
        return codec


_FLOATS, _LEGACY = "puna.tensor.floats", "puna.tensor.legacy"
_KQUANTS, _IQUANTS = "puna.tensor.kquants", "puna.tensor.iquants"

QUANT_TYPES: dict[str, QuantType] = {
    t.name: t
    for t in (
        QuantType("F32", 1, 4, 0, _FLOATS),
        QuantType("F16", 1, 2, 1, _FLOATS),
        QuantType("BF16", 1, 2, 30, _FLOATS),
        QuantType("Q4_0", 32, 18, 2, _LEGACY),
        QuantType("Q4_1", 32, 20, 3, _LEGACY),
        QuantType("Q5_0", 32, 22, 6, _LEGACY),
        QuantType("Q5_1", 32, 24, 7, _LEGACY),
        QuantType("Q8_0", 32, 34, 8, _LEGACY),
        QuantType("Q2_K", 256, 84, 10, _KQUANTS),
        QuantType("Q3_K", 256, 110, 11, _KQUANTS),
        QuantType("Q4_K", 256, 144, 12, _KQUANTS),
        QuantType("Q5_K", 256, 176, 13, _KQUANTS),
        QuantType("Q6_K", 256, 210, 14, _KQUANTS),
        QuantType("Q8_K", 256, 292, 15, _KQUANTS),
        QuantType("IQ4_NL", 32, 18, 20, _IQUANTS),
        QuantType("IQ4_XS", 256, 136, 23, _IQUANTS),
    )
}


def quant_type(name: str) -> QuantType:
    """The type of that name (case-insensitive). Raises CheckpointError naming the known ones."""
    try:
        return QUANT_TYPES[name.upper()]
    except KeyError:
        raise CheckpointError(f"unknown weight type {name!r}; known: {', '.join(QUANT_TYPES)}") from None
