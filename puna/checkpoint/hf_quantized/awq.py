"""AWQ folders (Lin et al. 2024) in AutoAWQ's GEMM layout.

Tensors of a module: ``qweight`` int32[inputs, outputs / 8], ``qzeros`` int32[groups, outputs / 8], ``scales``
float16[groups, outputs]. A word holds eight outputs: from the lowest four bits on, those numbered 0, 2, 4, 6, 1, 3, 5
and 7.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.hf_quantized.gptq import consecutive_groups_of
from puna.checkpoint.hf_quantized.layout import (
    FLOATS,
    Fields,
    Matrix,
    Parts,
    Spacing,
    floats,
    group_count,
    groups_title,
    word_bytes,
)
from puna.checkpoint.safetensors import StoredTensor
from puna.tensor.bits import fields, join
from puna.tensor.groupwise import Grouped

_BITS, _PER_WORD = 4, 8
_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])


class AwqLayout:
    mains: tuple[str, ...] = ("qweight",)
    beside: tuple[str, ...] = ("qzeros", "scales")

    def __init__(self, config: Fields) -> None:
        config.one_of(("bits", "w_bit"), (_BITS,), _BITS)
        config.one_of(("version",), ("gemm", "GEMM"), "gemm")
        config.one_of(("zero_point",), (True,), True)
        self.group_size = config.group_size(("group_size", "q_group_size"))
        self.title = f"AWQ, {_BITS} bits in {groups_title(self.group_size)}"

    def matrix(self, parts: Parts) -> Matrix:
        qweight = parts.need("qweight", ("I32",), (None, None))
        columns, rows = qweight.shape[0], qweight.shape[1] * _PER_WORD
        groups = group_count(columns, self.group_size)
        scales = parts.need("scales", FLOATS, (groups, rows))
        qzeros = parts.need("qzeros", ("I32",), (groups, qweight.shape[1]))

        def spacing() -> Spacing:
            return (
                np.ascontiguousarray(floats(scales).T),
                np.ascontiguousarray(_unpacked(qzeros.array()).T.astype(np.int16)),
                consecutive_groups_of(columns, self.group_size),
            )

        return Matrix.grouped(
            (rows, columns), _BITS, lambda: np.ascontiguousarray(_unpacked(qweight.array()).T), spacing
        )


def awq_config(group_size: int) -> dict[str, Any]:
    """The ``quantization_config`` of folders whose modules awq_tensors writes."""
    return {
        "quant_method": "awq",
        "bits": _BITS,
        "group_size": group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


def awq_tensors(module: str, matrix: Grouped) -> Iterable[StoredTensor]:
    """The tensors of one module, whose groups are in order."""
    assert matrix.bits == _BITS
    assert matrix.in_order
    arrays = {
        "qweight": _packed(matrix.codes.T),
        "qzeros": _packed(matrix.zeros.T.astype(np.uint8)),
        "scales": matrix.scales.T.astype("<f2"),
    }
    return [StoredTensor.from_array(f"{module}.{name}", array) for name, array in arrays.items()]


def _unpacked(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """int32[n, m / 8] -> uint8[n, m]."""
    stored = fields(word_bytes(words), _BITS).reshape(*words.shape, _PER_WORD)
    return stored[..., np.argsort(_ORDER)].reshape(len(words), -1)


def _packed(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The inverse of _unpacked."""
    stored = codes.reshape(len(codes), -1, _PER_WORD)[..., _ORDER]
    return join(stored, _BITS).view("<i4")[..., 0]
