"""The table of weight encodings: how a block of numbers is packed into bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.errors import CheckpointError

Codec = Callable[..., NDArray[Any]]

_NUMBERS_AT_ONCE = 1 << 17


@dataclass(frozen=True)
class QuantType:
    """One encoding of numbers.

    ``block_size`` consecutive numbers of a row occupy ``block_bytes`` bytes. ``gguf_id`` is the type's number in
    GGUF files. ``module`` holds ``decode_<name>(uint8[blocks, block_bytes]) -> float32[blocks, block_size]`` and,
    where the type can be written, ``encode_<name>(float32[blocks, block_size]) -> uint8[blocks, block_bytes]``.
    Encoders of fewer than 8 bits also take an importance of the numbers' shape.
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
        """uint8[..., row_bytes] -> float32[..., columns]. Raises CheckpointError when a row is not whole blocks."""
        if data.shape[-1] % self.block_bytes:
            raise CheckpointError(
                f"a row of {data.shape[-1]} bytes cannot be {self.name}, which has {self.block_bytes} bytes a block"
            )
        columns = data.shape[-1] // self.block_bytes * self.block_size
        blocks = np.ascontiguousarray(data).reshape(-1, self.block_bytes)
        with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale gives NaN, which is what the file says
            numbers = self._apply(self._codec("decode"), blocks, np.float32, self.block_size)
        return numbers.reshape(*data.shape[:-1], columns)

    def encode(self, values: NDArray[np.float32], importance: NDArray[np.float32] | None = None) -> NDArray[np.uint8]:
        """float32[..., columns] -> uint8[..., row_bytes].

        ``importance``, float32[columns] >= 0, says how much an error in each column counts; types of 8 bits and more
        have no use for it.

        Raises CheckpointError where no encoder exists, when the columns are not whole blocks, and when a quantized type
        cannot hold a number (infinite, not a number, or too large).
        """
        row_bytes = self.row_bytes(values.shape[-1])
        blocks = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, self.block_size)
        codec = self._codec("encode")
        if importance is None or self.bits_per_weight > 8:
            encoded = self._apply(codec, blocks, np.uint8, self.block_bytes)
        else:
            spread = np.broadcast_to(importance.astype(np.float32, copy=False), values.shape)
            encoded = self._apply(codec, blocks, np.uint8, self.block_bytes, spread.reshape(-1, self.block_size))
        return encoded.reshape(*values.shape[:-1], row_bytes)

    @property
    def can_encode(self) -> bool:
        return hasattr(import_module(self.module), f"encode_{self.name.lower()}")

    def _codec(self, direction: str) -> Codec:
        codec: Codec | None = getattr(import_module(self.module), f"{direction}_{self.name.lower()}", None)
        if codec is None:
            raise CheckpointError(f"{self.name} can be read but not written; choose another type")
        return codec

    def _apply(self, codec: Codec, blocks: NDArray[Any], dtype: type, width: int, *more: NDArray[Any]) -> NDArray[Any]:
        """The codec over slices of the blocks, so that its temporaries stay in the processor's cache."""
        step = _NUMBERS_AT_ONCE // self.block_size
        if self.block_size == 1 or len(blocks) <= step:
            return codec(blocks, *more)
        out: NDArray[Any] = np.empty((len(blocks), width), dtype)
        for start in range(0, len(blocks), step):
            out[start : start + step] = codec(
                blocks[start : start + step], *(one[start : start + step] for one in more)
            )
        return out


_FLOATS, _LEGACY = "puna.tensor.floats", "puna.tensor.legacy"
_KQUANTS, _IQUANTS = "puna.tensor.kquants", "puna.tensor.iquants"
_CODEBOOKS, _SMALL = "puna.tensor.codebook_quants", "puna.tensor.small_floats"

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
        QuantType("IQ2_XXS", 256, 66, 16, _CODEBOOKS),
        QuantType("IQ2_XS", 256, 74, 17, _CODEBOOKS),
        QuantType("IQ2_S", 256, 82, 22, _CODEBOOKS),
        QuantType("IQ3_XXS", 256, 98, 18, _CODEBOOKS),
        QuantType("IQ3_S", 256, 110, 21, _CODEBOOKS),
        QuantType("IQ1_S", 256, 50, 19, _CODEBOOKS),
        QuantType("IQ1_M", 256, 56, 29, _CODEBOOKS),
        QuantType("TQ1_0", 256, 54, 34, _SMALL),
        QuantType("TQ2_0", 256, 66, 35, _SMALL),
        QuantType("MXFP4", 32, 17, 39, _SMALL),
    )
}


def quant_type(name: str) -> QuantType:
    """The type of that name (case-insensitive). Raises CheckpointError naming the known ones."""
    try:
        return QUANT_TYPES[name.upper()]
    except KeyError:
        raise CheckpointError(f"unknown weight type {name!r}; known: {', '.join(QUANT_TYPES)}") from None
