"""GPTQ folders (Frantar et al. 2023) as AutoGPTQ and GPTQModel write them.

Tensors of a module: ``qweight`` int32[inputs · bits / 32, outputs], codes packed along the inputs, the first lowest;
``qzeros`` int32[groups, outputs · bits / 32], packed along the outputs; ``scales`` float16[groups, outputs]; ``g_idx``
int32[inputs], the group of each input. The first version of the format (``checkpoint_format`` ``gptq``) stores zero
points less one: of each number by itself, or, by GPTQModel, of whole words, where a 0 borrows from the number above.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.hf_quantized.layout import (
    FLOATS,
    Fields,
    Matrix,
    Parts,
    Spacing,
    column_groups,
    floats,
    group_count,
    groups_title,
    word_bytes,
)
from puna.checkpoint.safetensors import StoredTensor
from puna.tensor.bits import fields, join
from puna.tensor.groupwise import Grouped

_ONES = {
    bits: np.int32(sum(1 << at for at in range(0, 32, bits))) for bits in (2, 4, 8)
}  # a 1 in each number of a word


class GptqLayout:
    mains: tuple[str, ...] = ("qweight",)
    beside: tuple[str, ...] = ("qzeros", "scales", "g_idx")

    def __init__(self, config: Fields) -> None:
        self.bits: int = config.one_of(("bits",), (2, 4, 8))
        self.group_size = config.group_size(("group_size",))
        self.act_order: bool = config.one_of(("desc_act",), (True, False), False)
        version = config.one_of(("checkpoint_format", "format"), ("gptq", "gptq_v2"), "gptq")
        self.zero_offset = 1 if version == "gptq" else 0
        meta = config.raw.get("meta")
        maker = meta.get("quantizer") if isinstance(meta, dict) else None
        self.borrows = self.zero_offset == 1 and "gptqmodel" in str(maker).lower()
        self.title = f"GPTQ, {self.bits} bits in {groups_title(self.group_size)}"

    def matrix(self, parts: Parts) -> Matrix:
        qweight = parts.need("qweight", ("I32",), (None, None))
        columns, rows = qweight.shape[0] * 32 // self.bits, qweight.shape[1]
        groups = group_count(columns, self.group_size)
        scales = parts.need("scales", FLOATS, (groups, rows))
        qzeros = parts.need("qzeros", ("I32",), (groups, -(-rows * self.bits // 32)))
        if "g_idx" in parts or (self.act_order and groups > 1):
            parts.need("g_idx", ("I32", "I64"), (columns,))

        def codes() -> NDArray[np.uint8]:
            unpacked = fields(word_bytes(qweight.array()[..., None]), self.bits)  # [words, outputs, inputs of a word]
            return np.ascontiguousarray(unpacked.transpose(1, 0, 2)).reshape(rows, columns)

        def spacing() -> Spacing:
            order = column_groups(parts, "g_idx", columns, groups)
            words = qzeros.array()
            if self.borrows:
                words = words + _ONES[self.bits]
            offset = 0 if self.borrows else self.zero_offset
            zeros = fields(word_bytes(words), self.bits)[:, :rows].T.astype(np.int16) + offset
            return (
                np.ascontiguousarray(floats(scales).T),
                np.ascontiguousarray(zeros % (1 << self.bits)),  # 0, stored less one, has wrapped
                consecutive_groups_of(columns, self.group_size) if order is None else order,
            )

        return Matrix.grouped((rows, columns), self.bits, codes, spacing)


def consecutive_groups_of(columns: int, group_size: int) -> NDArray[np.intp]:
    """The group of each column where every ``group_size`` of them, or all (-1), are one."""
    order: NDArray[np.intp] = np.arange(columns) // (columns if group_size == -1 else group_size)
    return order


def gptq_config(bits: int, group_size: int, symmetric: bool, zero_offset: int, reordered: bool) -> dict[str, Any]:
    """The ``quantization_config`` of folders whose modules gptq_tensors writes.

    ``desc_act`` tells loaders whether groups are out of order, not in which order they were rounded.
    """
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": symmetric,
        "desc_act": reordered,
        "checkpoint_format": "gptq" if zero_offset else "gptq_v2",
        "lm_head": False,
    }


def gptq_tensors(module: str, matrix: Grouped, zero_offset: int) -> Iterable[StoredTensor]:
    """The tensors of one module, in the first version of the format (zero points less 1) or the second (less 0)."""
    rows, columns = matrix.codes.shape
    per_word = 32 // matrix.bits
    codes = matrix.codes.reshape(rows, columns // per_word, per_word).transpose(1, 0, 2)
    zeros = ((matrix.zeros.T - zero_offset) % (1 << matrix.bits)).astype(np.uint8)
    arrays = {
        "qweight": join(codes, matrix.bits).view("<i4")[..., 0],
        "qzeros": join(zeros, matrix.bits).view("<i4"),
        "scales": matrix.scales.T.astype("<f2"),
        "g_idx": matrix.groups.astype("<i4"),
    }
    return [StoredTensor.from_array(f"{module}.{name}", array) for name, array in arrays.items()]
