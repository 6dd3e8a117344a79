"""Writing GGUF version 3 files: the container only. Source: the GGUF specification (ggml/docs/gguf.md)."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.atomic import atomic_path
from puna.gguf_file import (
    ARRAY,
    BOOL,
    DEFAULT_ALIGNMENT,
    FLOAT32,
    INT32,
    INT64,
    MAGIC,
    NUMBER_DTYPES,
    STRING,
    UINT32,
    UINT64,
    TextArray,
)
from puna.tensor import QuantType

# general.file_type, by the type of most matrix weights (llama.cpp's llama_ftype; the K-quants' medium mixes).
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
}
# Mixes of types, by llama.cpp's names.
MIX_FILE_TYPES = {
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
}

Encoded = tuple[QuantType, Iterable[NDArray[np.uint8]]]
_Description = tuple[tuple[int, ...], int, int]


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    encode: Callable[[str], Encoded],
) -> None:
    """Write a file, tensor by tensor.

    ``shapes`` names the tensors, in order; ``encode`` is called once for each and gives its type and its bytes in
    pieces. Whole numbers become uint32 where they fit (int32 in arrays, as llama.cpp expects), fractions float32; empty
    arrays are left out, since nothing tells their type. ``general.file_type`` and its kin are added here.
    Raises CheckpointError when the file cannot be written.
    """
    metadata = {**metadata, "general.file_type": 0, "general.quantization_version": 2}
    described: dict[str, _Description] = {name: (shape, 0, 0) for name, shape in shapes.items()}
    numbers: Counter[str] = Counter()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        # Types and offsets take the same room whatever they are, so the header can be written last.
        start = _aligned(len(_header(metadata, described)))
        at = start
        for name, shape in shapes.items():
            kind, pieces = encode(name)
            described[name] = (shape, kind.gguf_id, at - start)
            file.seek(at)
            for piece in pieces:
                file.write(np.ascontiguousarray(piece).data)
            size = tensor_bytes(shape, kind)
            assert file.tell() == at + size, f"{name}: {file.tell() - at} bytes written, {size} expected"
            at = _aligned(at + size)
            if len(shape) > 1:
                numbers[kind.name] += size // kind.block_bytes * kind.block_size
        if numbers:
            metadata["general.file_type"] = FILE_TYPES.get(numbers.most_common(1)[0][0], 0)
        file.truncate(at)
        file.seek(0)
        file.write(_header(metadata, described))


def gguf_layout(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], QuantType]]
) -> tuple[bytes, dict[str, int], int]:
    """A file whose types are all known: its header, where in the file each tensor starts, and how long the file is."""
    start = _aligned(len(_header(metadata, {name: (shape, 0, 0) for name, (shape, _) in tensors.items()})))
    starts: dict[str, int] = {}
    at = start
    for name, (shape, kind) in tensors.items():
        starts[name] = at
        at = _aligned(at + tensor_bytes(shape, kind))
    described = {name: (shape, kind.gguf_id, starts[name] - start) for name, (shape, kind) in tensors.items()}
    return _header(metadata, described), starts, at


def tensor_bytes(shape: tuple[int, ...], kind: QuantType) -> int:
    """Raises CheckpointError when a row is not whole blocks."""
    return int(np.prod(shape[:-1], dtype=np.int64)) * kind.row_bytes(shape[-1])


def _header(metadata: Mapping[str, Any], described: Mapping[str, _Description]) -> bytes:
    values = {key: value for key, value in metadata.items() if not (_is_array(value) and not value)}
    parts = [MAGIC, struct.pack("<IQQ", 3, len(described), len(values))]
    for key, value in values.items():
        parts += [_string(key), _value(key, value)]
    for name, (shape, type_id, offset) in described.items():
        parts += [_string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), type_id, offset)]
    return b"".join(parts)


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, TextArray):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + value.encoded
    if not _is_array(value):
        kind = _type_of(key, [value], UINT32)
        return struct.pack("<I", kind) + _elements(kind, [value])
    kind = _type_of(key, value, INT32)
    return struct.pack("<IIQ", ARRAY, kind, len(value)) + _elements(kind, value)


def _is_array(value: Any) -> bool:
    return isinstance(value, (list, tuple, TextArray))


def _type_of(key: str, values: list[Any] | tuple[Any, ...], whole: int) -> int:
    """The one type that holds all values; ``whole`` is the preferred type of whole numbers."""
    classes = {type(value) for value in values}
    if classes == {str}:
        return STRING
    if classes == {bool}:
        return BOOL
    if classes == {int}:
        low, high = min(values), max(values)
        fitting = (whole, INT32, UINT32, INT64, UINT64)
        return next(kind for kind in fitting if _fits(low, kind) and _fits(high, kind))
    assert classes <= {int, float}, f"{key} mixes or holds values that GGUF has no type for: {classes}"
    return FLOAT32


def _fits(value: int, kind: int) -> bool:
    limits = np.iinfo(NUMBER_DTYPES[kind])
    return int(limits.min) <= value <= int(limits.max)


def _elements(kind: int, values: list[Any] | tuple[Any, ...]) -> bytes:
    if kind == STRING:
        return b"".join(map(_string, values))
    return np.array(values, dtype=NUMBER_DTYPES[kind]).tobytes()


def _string(text: str) -> bytes:
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw


def _aligned(position: int) -> int:
    return -(-position // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
