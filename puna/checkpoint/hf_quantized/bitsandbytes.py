"""Folders that bitsandbytes quantized: 4 bits (NF4 or FP4, Dettmers et al. 2023) and 8 bits (Dettmers et al. 2022).

Tensors of a 4-bit module: ``weight`` uint8[n / 2, 1], two codes a byte, the first in the high half, of the flat matrix;
``weight.quant_map`` float32[16], the levels; ``weight.absmax``, the scale of each block of the flat matrix, float32, or
with double quantization uint8 places in ``weight.nested_quant_map``, to be multiplied by ``weight.nested_absmax`` and
added to ``nested_offset``; ``weight.quant_state.bitsandbytes__nf4`` (or fp4), JSON with the shape and sizes of blocks.
Of an 8-bit module: ``weight`` int8, ``SCB`` float32[outputs], the largest magnitude of each row, which 127 stands for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.hf_quantized.layout import Fields, Matrix, Parts, Rows, Spacing, floats
from puna.checkpoint.safetensors import StoredTensor
from puna.tensor.nf4 import BLOCK, NESTED_BLOCK, NF4_LEVELS, block_scales, dynamic_levels, quantize_nf4

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_MAX_STATE_BYTES = 1 << 16


class BitsAndBytesLayout:
    mains: tuple[str, ...] = ("weight",)
    beside: tuple[str, ...] = (
        "SCB",
        "weight_format",
        "weight.absmax",
        "weight.quant_map",
        "weight.nested_absmax",
        "weight.nested_quant_map",
        *_STATES,
    )

    def __init__(self, config: Fields) -> None:
        """All that matters is told by the tensors."""
        four = config.raw.get("load_in_4bit") is True
        self.title = f"bitsandbytes {'4 bits' if four else '8 bits'}"

    def matrix(self, parts: Parts) -> Matrix:
        if parts.need("weight", ("U8", "I8")).dtype == "I8":
            return _eight_bits(parts)
        return _four_bits(parts)


def _eight_bits(parts: Parts) -> Matrix:
    weight = parts.need("weight", ("I8",), (None, None))
    rows, columns = weight.shape
    largest = parts.need("SCB", ("F32",), (rows,))

    def spacing() -> Spacing:
        zeros = np.full((rows, 1), 128, np.int16)
        return floats(largest)[:, None] / np.float32(127), zeros, np.zeros(columns, np.intp)

    return Matrix.grouped((rows, columns), 8, lambda: weight.array().view(np.uint8) ^ np.uint8(128), spacing)


def _four_bits(parts: Parts) -> Matrix:
    state = _State(parts)
    rows, columns = state.shape
    count = rows * columns
    blocks = -(-count // state.block)
    packed = parts.need("weight", ("U8",))
    if packed.data.size != -(-count // 2):
        raise parts.error(
            "weight", f"has {packed.data.size} bytes; a matrix of shape {state.shape} needs {-(-count // 2)}"
        )
    levels = parts.need("weight.quant_map", ("F32",), (16,))
    nested = "weight.nested_absmax" in parts
    absmax = parts.need("weight.absmax", ("U8",) if nested else ("F32",), (blocks,))
    if nested:
        parts.need("weight.nested_absmax", ("F32",), (-(-blocks // state.nested_block),))
        parts.need("weight.nested_quant_map", ("F32",), (256,))

    def read() -> Rows:
        if nested:
            table, widths = (floats(parts.tensors[f"weight.nested_{part}"]) for part in ("quant_map", "absmax"))
            scales = block_scales(absmax.array(), table, widths, state.offset, state.nested_block)
        else:
            scales = floats(absmax)
        bytes_, table16 = packed.data, floats(levels)

        def numbers(piece: slice) -> NDArray[np.float32]:
            start, stop, _ = piece.indices(rows)
            first, last = start * columns, stop * columns
            both = bytes_[first // 2 : -(-last // 2)]
            codes = np.stack([both >> 4, both & 15], axis=1).reshape(-1)[first % 2 :][: last - first]
            block_of = np.arange(first, last) // state.block
            return (table16[codes] * scales[block_of]).reshape(-1, columns)

        return numbers

    return Matrix.encoded(state.shape, read)


class _State:
    """The JSON of a 4-bit module, checked."""

    def __init__(self, parts: Parts) -> None:
        name = next((state for state in _STATES if state in parts), _STATES[0])
        stored = parts.need(name, ("U8",))
        try:
            raw = json.loads(stored.data[:_MAX_STATE_BYTES].tobytes())
            shape, block = raw["shape"], raw["blocksize"]
            self.nested_block: int = raw.get("nested_blocksize", NESTED_BLOCK)
            self.offset = float(raw.get("nested_offset", 0))
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError, OverflowError):
            raise parts.error(name, "is not JSON with a shape and a blocksize; the file is damaged") from None
        sizes = (*shape, block, self.nested_block) if isinstance(shape, list) and len(shape) == 2 else (None,)
        if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
            raise parts.error(name, "has no sensible shape, blocksize or nested_blocksize; the file is damaged")
        self.shape: tuple[int, int] = (shape[0], shape[1])
        self.block: int = block


def nf4_config() -> dict[str, Any]:
    """The ``quantization_config`` of folders whose modules nf4_tensors writes."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head"],
    }


def nf4_tensors(module: str, values: NDArray[np.float32]) -> Iterable[StoredTensor]:
    """The tensors of one module."""
    quantized = quantize_nf4(values.reshape(-1))
    codes = np.append(quantized.codes, np.zeros(len(quantized.codes) % 2, np.uint8)).reshape(-1, 2)
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": list(values.shape),
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": quantized.offset,
    }
    arrays: dict[str, NDArray[Any]] = {
        "weight": (codes[:, :1] << 4 | codes[:, 1:]),
        "weight.absmax": quantized.scales,
        "weight.quant_map": NF4_LEVELS,
        "weight.nested_absmax": quantized.nested_scales,
        "weight.nested_quant_map": dynamic_levels(),
        _STATES[0]: np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    return [StoredTensor.from_array(f"{module}.{name}", array) for name, array in arrays.items()]
