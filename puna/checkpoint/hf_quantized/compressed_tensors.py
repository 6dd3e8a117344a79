"""Folders of the compressed-tensors library (``pack-quantized``, ``int-quantized``, ``naive-quantized``,
``float-quantized``), and other folders of E4M3 floats with scales, which store these likewise.

Tensors of a packed module: ``weight_packed`` int32[outputs, inputs · bits / 32], codes with half their range added, the
first lowest; ``weight_shape`` int64[2]; ``weight_scale`` [outputs, groups]; where zero points are not all 0,
``weight_zero_point`` int32[outputs · bits / 32, groups], packed along the outputs likewise; ``weight_g_idx``, the group
of each input. Of others: ``weight`` int8 or E4M3[outputs, inputs], ``weight_scale`` (or ``weight_scale_inv``) for the
whole matrix, each output, or each block; ``weight_zero_point`` int8. What is said of activations is not needed: the
kernels round them in their own way.
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
    groups_title,
    word_bytes,
)
from puna.checkpoint.safetensors import StoredTensor
from puna.tensor.bits import fields, join
from puna.tensor.fp8 import LARGEST, decode_e4m3, encode_e4m3
from puna.tensor.groupwise import Grouped, consecutive_groups

_FORMATS = (
    "dense",
    "pack-quantized",
    "int-quantized",
    "naive-quantized",
    "float-quantized",
    "mixed-precision",
)


class ByteLayout:
    """``weight`` of int8 or E4M3 numbers with scales: FP8 folders of every maker."""

    mains: tuple[str, ...] = ("weight",)
    beside: tuple[str, ...] = (
        "weight_scale",
        "weight_scale_inv",
        "weight_zero_point",
        "input_scale",
        "input_zero_point",
        "input_scale_ub",
        "activation_scale",
        "output_scale",
        "output_zero_point",
    )

    def __init__(self, config: Fields) -> None:
        self.title = "FP8"
        self.block: tuple[int, int] | None = None
        block = config.raw.get("weight_block_size")
        if block is not None:
            if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
                raise config.error("weight_block_size", f"is {block!r:.80}; expected the rows and columns of a block")
            self.block = (block[0], block[1])

    def matrix(self, parts: Parts) -> Matrix:
        weight = parts.need("weight", ("I8", "F8_E4M3"), (None, None))
        rows, columns = weight.shape
        name = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
        scale = parts.need(name, FLOATS)
        if weight.dtype == "I8":
            return _integers(parts, weight, scale)
        spread = self._block_of(parts, name, scale, (rows, columns))

        def numbers(piece: slice) -> NDArray[np.float32]:
            codes = weight.array()[piece]
            row_blocks = np.arange(rows)[piece] // spread[0]
            scales = floats(scale).reshape(-(-rows // spread[0]), -(-columns // spread[1]))
            return decode_e4m3(codes) * np.repeat(scales[row_blocks], spread[1], axis=1)[:, :columns]

        return Matrix.encoded((rows, columns), lambda: numbers)

    def _block_of(self, parts: Parts, name: str, scale: StoredTensor, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the matrix that share a scale."""
        rows, columns = shape
        candidates = [((1,), shape), ((), shape), ((rows,), (1, columns)), ((rows, 1), (1, columns)), ((1, 1), shape)]
        if self.block is not None:
            candidates.insert(0, ((-(-rows // self.block[0]), -(-columns // self.block[1])), self.block))
        for found, block in candidates:
            if scale.shape == found:
                return block[0] or 1, block[1] or 1
        raise parts.error(name, f"has shape {scale.shape}, which is neither one scale nor one for each of {rows} rows")


class CompressedTensorsLayout(ByteLayout):
    mains: tuple[str, ...] = ("weight_packed", "weight")
    beside: tuple[str, ...] = (*ByteLayout.beside, "weight_shape", "weight_g_idx")

    def __init__(self, config: Fields) -> None:
        config.one_of(("format",), _FORMATS, "dense")
        config.refuse("transform_config", "the weights are rotated, which is not supported")
        sparsity = config.raw.get("sparsity_config") or {}
        if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
            raise config.error("sparsity_config", "asks for sparse weights, which are not supported")
        super().__init__(config)
        groups = config.raw.get("config_groups")
        weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
        self.title = _title(config.raw.get("format", "dense"), [w for w in weights if isinstance(w, dict)])
        blocks = [w.get("block_structure") for w in weights if isinstance(w, dict) and w.get("block_structure")]
        if blocks:
            self.block = ByteLayout(Fields(config.source, {"weight_block_size": blocks[0]})).block

    def matrix(self, parts: Parts) -> Matrix:
        if "weight_packed" not in parts:
            return super().matrix(parts)
        packed = parts.need("weight_packed", ("I32",), (None, None))
        shape = parts.need("weight_shape", ("I64", "I32"), (2,)).array()
        rows, columns = int(shape[0]), int(shape[1])
        bits = next((b for b in (2, 4, 8) if packed.shape == (rows, -(-columns * b // 32))), None)
        if bits is None:
            problem = f"has shape {packed.shape}, which is not that of {(rows, columns)} numbers of 2, 4 or 8 bits"
            raise parts.error("weight_packed", problem)
        scale = parts.need("weight_scale", FLOATS)
        groups = _groups_of(parts, scale, rows, columns)
        if "weight_zero_point" in parts:
            parts.need("weight_zero_point", ("I32",), (-(-rows * bits // 32), groups))
        if "weight_g_idx" in parts:
            parts.need("weight_g_idx", ("I32", "I64"), (columns,))

        def codes() -> NDArray[np.uint8]:
            return np.ascontiguousarray(fields(word_bytes(packed.array()), bits)[:, :columns])

        def spacing() -> Spacing:
            zeros = np.full((rows, groups), 1 << (bits - 1), np.int16)
            if "weight_zero_point" in parts:
                stored = np.ascontiguousarray(parts.tensors["weight_zero_point"].array().T)
                zeros = np.ascontiguousarray(fields(word_bytes(stored), bits)[:, :rows].T).astype(np.int16)
            order = column_groups(parts, "weight_g_idx", columns, groups)
            order = consecutive_groups(columns, groups) if order is None else order
            return _scales(scale, rows, groups), zeros, order

        return Matrix.grouped((rows, columns), bits, codes, spacing)


def _title(form: Any, weights: list[dict[str, Any]]) -> str:
    """With what the first group of modules says of its numbers, where that is well formed."""
    bits, size = (weights[0].get(field) if weights else None for field in ("num_bits", "group_size"))
    title = f"compressed-tensors {form}"
    if type(bits) is int:
        title += f", {bits} bits"
        title += f" in {groups_title(size)}" if type(size) is int and size > 0 else ""
    return title


def _integers(parts: Parts, weight: StoredTensor, scale: StoredTensor) -> Matrix:
    rows, columns = weight.shape
    groups = _groups_of(parts, scale, rows, columns)
    if "weight_zero_point" in parts:
        parts.need("weight_zero_point", ("I8",), scale.shape)

    def spacing() -> Spacing:
        zeros = np.full((rows, groups), 128, np.int16)
        if "weight_zero_point" in parts:
            stored = parts.tensors["weight_zero_point"].array().astype(np.int16)
            zeros = np.array(np.broadcast_to(_by_rows(stored, rows, groups), (rows, groups))) + np.int16(128)
        return _scales(scale, rows, groups), zeros, consecutive_groups(columns, groups)

    return Matrix.grouped((rows, columns), 8, lambda: weight.array().view(np.uint8) ^ np.uint8(128), spacing)


def _groups_of(parts: Parts, scale: StoredTensor, rows: int, columns: int) -> int:
    """How many groups of columns have scales of their own."""
    if scale.shape in ((), (1,), (1, 1), (rows,)):
        return 1
    if len(scale.shape) != 2 or scale.shape[0] != rows or not 0 < scale.shape[1] <= max(1, columns):
        raise parts.error("weight_scale", f"has shape {scale.shape}; expected ({rows}, number of groups)")
    if columns % scale.shape[1]:
        raise parts.error("weight_scale", f"has {scale.shape[1]} groups, into which {columns} columns cannot be split")
    return scale.shape[1]


def _scales(scale: StoredTensor, rows: int, groups: int) -> NDArray[np.float32]:
    return np.array(np.broadcast_to(_by_rows(floats(scale), rows, groups), (rows, groups)))


def _by_rows(values: NDArray[Any], rows: int, groups: int) -> NDArray[Any]:
    return values.reshape(rows, groups) if values.size == rows * groups else values.reshape(1, 1)


def packed_tensors(module: str, matrix: Grouped) -> Iterable[StoredTensor]:
    """The tensors of one ``pack-quantized`` module, whose groups are in order."""
    assert matrix.in_order
    rows, columns = matrix.codes.shape
    arrays: dict[str, NDArray[Any]] = {
        "weight_packed": _words(matrix.codes, matrix.bits),
        "weight_scale": matrix.scales.astype("<f2"),
        "weight_shape": np.array([rows, columns], "<i8"),
    }
    if (matrix.zeros != 1 << (matrix.bits - 1)).any():
        arrays["weight_zero_point"] = _words(matrix.zeros.T.astype(np.uint8), matrix.bits).T
    return [StoredTensor.from_array(f"{module}.{name}", array) for name, array in arrays.items()]


def int_tensors(module: str, matrix: Grouped) -> Iterable[StoredTensor]:
    """The tensors of one ``int-quantized`` module of 8 bits, one scale a row, no zero points."""
    assert matrix.bits == 8
    assert matrix.scales.shape[1] == 1
    codes = (matrix.codes ^ np.uint8(128)).view(np.int8)
    return [
        StoredTensor.from_array(f"{module}.weight", codes),
        StoredTensor.from_array(f"{module}.weight_scale", matrix.scales.astype("<f2")),
    ]


def fp8_tensors(module: str, values: NDArray[np.float32]) -> Iterable[StoredTensor]:
    """The tensors of one ``float-quantized`` module, one scale a row."""
    largest = np.abs(values).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / LARGEST, 1).astype(np.float32)
    codes = encode_e4m3(values / scales)
    return [
        StoredTensor(f"{module}.weight", "F8_E4M3", codes.shape, codes.reshape(-1)),
        StoredTensor.from_array(f"{module}.weight_scale", scales.astype("<f4")),
    ]


def compressed_config(
    format_name: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of folders whose linear layers, but the head, are stored as ``weights`` says.

    ``inputs`` says how programs that compute in fewer bits round what these layers read.
    """
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group | {"format": format_name}},
        "kv_cache_scheme": None,
    }


def _words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """Codes of each row packed, the first lowest, the last word filled up with zeros."""
    per_word = 32 // bits
    padded = np.zeros((len(codes), -(-codes.shape[1] // per_word) * per_word), np.uint8)
    padded[:, : codes.shape[1]] = codes
    return join(padded, bits).view("<i4")
