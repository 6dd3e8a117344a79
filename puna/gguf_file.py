"""Reading GGUF files: the container only; what its contents mean to a Llama model is in gguf.py.

Source: the GGUF specification (ggml/docs/gguf.md), versions 2 and 3. A file is: magic, version, two counts, metadata
(key, type, value), tensor descriptions (name, dimensions innermost first, type, offset), padding, tensor data.

Nothing read is trusted: every count and length is held against the bytes that are left before anything is allocated,
and all that comes before the tensor data may not take more than MAX_HEADER_BYTES.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from puna.errors import CheckpointError
from puna.tensor import QUANT_TYPES, Weight
from puna.tensor.mapped import drop_mapped_pages

try:
    from puna._native import read_strings, skip_strings
except ImportError:  # the extension was not built

    def skip_strings(buffer: Any, start: int, end: int, count: int) -> int | None:
        """Left to the loop in Python."""
        return None

    def read_strings(encoded: bytes, count: int) -> list[str]:
        texts, at = [], 0
        for _ in range(count):
            start = at + 8
            at = start + int.from_bytes(encoded[at:start], "little")
            texts.append(encoded[start:at].decode())
        return texts


MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_HEADER_BYTES = 1 << 26
MAX_DIMENSIONS = 4
MAX_NESTING = 4

# Type numbers of metadata values.
UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
NUMBER_DTYPES = {
    UINT8: "<u1",
    INT8: "<i1",
    UINT16: "<u2",
    INT16: "<i2",
    UINT32: "<u4",
    INT32: "<i4",
    FLOAT32: "<f4",
    BOOL: "?",
    UINT64: "<u8",
    INT64: "<i8",
    FLOAT64: "<f8",
}

_TYPES = {kind.gguf_id: kind for kind in QUANT_TYPES.values()}
# Encodings that exist but that Puna does not decode, so that the message can name them.
_OTHER_TYPES = {
    9: "Q8_1",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    40: "NVFP4",
    41: "Q1_0",
}

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class TextArray(Sequence[str]):
    """Strings of a file, as it spells them (``encoded``) until they are asked for: few programs want all merges."""

    def __init__(self, encoded: bytes, count: int) -> None:
        self.encoded = encoded
        self._count = count

    @classmethod
    def of(cls, texts: Sequence[str]) -> TextArray:
        encoded = [text.encode() for text in texts]
        return cls(b"".join(piece for text in encoded for piece in (_U64.pack(len(text)), text)), len(encoded))

    def tolist(self) -> list[str]:
        texts: list[str] = read_strings(self.encoded, self._count)
        return texts

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return self.tolist()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (TextArray, list)) and self.tolist() == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class GGUFFile:
    """Metadata as Python values and tensors under GGUF's names, in the order of the file.

    Arrays are lists, those of strings TextArray. The tensors' data are views of the mapped file: nothing is read before
    it is used.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Weight]


def read_gguf(path: Path) -> GGUFFile:
    """Map a GGUF file, or all parts of a split one given any part. Raises CheckpointError."""
    file = _read_part(path)
    parts = _part_paths(path, file.metadata)
    if parts is None:
        return file
    metadata: dict[str, Any] = {}
    tensors: dict[str, Weight] = {}
    for number, part_path in enumerate(parts):
        part = file if part_path.name == path.name else _read_part(part_path)
        found = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if found != (number, len(parts)):
            raise CheckpointError(
                f"{part_path}: expected split.no {number} and split.count {len(parts)}, found {found[0]} and {found[1]}"
            )
        for name in part.tensors:
            if name in tensors:
                raise CheckpointError(f"{part_path}: tensor {name} is in an earlier part too")
        metadata = part.metadata | metadata
        tensors |= part.tensors
    total = metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(f"{path}: its parts hold {len(tensors)} tensors, split.tensors.count says {total}")
    return GGUFFile(path, {k: v for k, v in metadata.items() if not k.startswith("split.")}, tensors)


def _part_paths(path: Path, metadata: dict[str, Any]) -> list[Path] | None:
    """The paths of all parts, in order; None for a file that is whole."""
    count = metadata.get("split.count", 1)
    if not isinstance(count, int):
        raise CheckpointError(f"{path}: split.count must be a whole number, found {count!r}")
    if count <= 1:
        return None
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, but its name does not say which; "
            f"restore the name it was published under, NAME-00001-of-{count:05}.gguf"
        )
    paths = [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise CheckpointError(f"{path}: {len(missing)} of {count} parts are missing beside it: {shown}")
    return paths


def _read_part(path: Path) -> GGUFFile:
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    reader = _Reader(path, buffer)
    tensor_count, value_count = reader.header()
    metadata = reader.metadata(value_count)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment must be a power of two, found {alignment!r}")
    tensors = reader.tensors(tensor_count, alignment)
    drop_mapped_pages(np.frombuffer(buffer, np.uint8, reader.at))  # the header is not looked at again
    return GGUFFile(path, metadata, tensors)


class _Reader:
    """A cursor over the header of one mapped file."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.at = len(MAGIC)
        self.end = min(len(buffer), MAX_HEADER_BYTES)

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")

    def take(self, size: int) -> int:
        """Where the next ``size`` bytes start; the cursor moves past them."""
        start = self.at
        if size > self.end - start:
            if len(self.buffer) > MAX_HEADER_BYTES:
                raise self.error(f"its header does not end within {MAX_HEADER_BYTES} bytes; the file is damaged")
            raise self.error(f"the file ends inside its header, at byte {len(self.buffer)}; it is truncated or damaged")
        self.at = start + size
        return start

    def u32(self) -> int:
        value: int = _U32.unpack_from(self.buffer, self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack_from(self.buffer, self.take(8))[0]
        return value

    def count(self, smallest: int, what: str) -> int:
        """A count of things of at least ``smallest`` bytes each, refused when so many cannot follow."""
        count = self.u64()
        if count * smallest > self.end - self.at:
            raise self.error(f"it claims {count} {what}, more than fit into it; it is truncated or damaged")
        return count

    def text(self, what: str) -> str:
        size = self.u64()
        start = self.take(size)
        try:
            return self.buffer[start : start + size].decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not valid UTF-8; the file is damaged") from None

    def texts(self, count: int, what: str) -> TextArray:
        start = self.at
        # A vocabulary is several hundred thousand strings. The loop says what is wrong with damaged ones.
        end: int | None = skip_strings(self.buffer, start, self.end, count)
        if end is None:
            for _ in range(count):
                self.text(what)
        else:
            self.at = end
        return TextArray(self.buffer[start : self.at], count)

    def header(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata values."""
        version = self.u32()
        if version and version & 0xFFFF == 0:
            raise self.error("a big-endian GGUF file is not supported; convert the model to little-endian GGUF")
        if version not in (2, 3):
            raise self.error(f"GGUF version {version} is not supported (known: 2, 3); convert the model again")
        return self.count(24, "tensors"), self.count(13, "metadata values")

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self.text("a metadata key")
            if key in values:
                raise self.error(f"metadata {key} is given twice")
            values[key] = self.value(self.u32(), key)
        return values

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text(key)
        if kind in NUMBER_DTYPES:
            return self.numbers(kind, 1)[0]
        if kind != ARRAY:
            raise self.error(f"metadata {key} has the unknown value type {kind}")
        if depth == MAX_NESTING:
            raise self.error(f"metadata {key} holds arrays nested more than {MAX_NESTING} deep")
        element = self.u32()
        if element in NUMBER_DTYPES:
            return self.numbers(element, self.count(np.dtype(NUMBER_DTYPES[element]).itemsize, f"values of {key}"))
        if element == STRING:
            return self.texts(self.count(8, f"values of {key}"), key)
        return [self.value(element, key, depth + 1) for _ in range(self.count(12, f"values of {key}"))]

    def numbers(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(NUMBER_DTYPES[kind])
        start = self.take(count * dtype.itemsize)
        values: list[Any] = np.frombuffer(self.buffer, dtype, count, start).tolist()
        return values

    def tensors(self, count: int, alignment: int) -> dict[str, Weight]:
        described: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.text("a tensor name")
            if name in described:
                raise self.error(f"tensor {name} is described twice")
            rank = self.u32()
            if not 1 <= rank <= MAX_DIMENSIONS:
                raise self.error(f"tensor {name} has {rank} dimensions, expected 1 to {MAX_DIMENSIONS}")
            shape = tuple(self.u64() for _ in range(rank))[::-1]
            described[name] = (shape, self.u32(), self.u64())
        start = -(-self.at // alignment) * alignment
        weights = {name: self.weight(name, *description, start, alignment) for name, description in described.items()}
        self.refuse_overlaps(weights, described)
        return weights

    def weight(
        self, name: str, shape: tuple[int, ...], type_id: int, offset: int, start: int, alignment: int
    ) -> Weight:
        kind = _TYPES.get(type_id)
        if kind is None:
            known = _OTHER_TYPES.get(type_id, f"number {type_id}")
            raise self.error(
                f"tensor {name} has the type {known}, which is not supported; known: {', '.join(QUANT_TYPES)}"
            )
        if 0 in shape:
            raise self.error(f"tensor {name} has the shape {shape}; every dimension must be positive")
        if offset % alignment:
            raise self.error(f"tensor {name} starts at {offset}, which is not a multiple of the alignment {alignment}")
        if shape[-1] % kind.block_size:
            raise self.error(
                f"tensor {name} has rows of {shape[-1]} numbers, but {kind.name} packs {kind.block_size} at a time"
            )
        packed = (*shape[:-1], kind.row_bytes(shape[-1]))
        size = math.prod(packed)
        if offset + size > len(self.buffer) - start:
            raise self.error(
                f"tensor {name} needs bytes {start + offset} to {start + offset + size}, but the file has "
                f"{len(self.buffer)}; it is truncated or damaged"
            )
        data = np.frombuffer(self.buffer, np.uint8, size, start + offset).reshape(packed)
        return Weight(name, shape, kind, data)

    def refuse_overlaps(
        self, weights: dict[str, Weight], described: dict[str, tuple[tuple[int, ...], int, int]]
    ) -> None:
        """No well-formed file shares bytes between tensors; a damaged one must not pass for a model."""
        end, previous = 0, ""
        for name in sorted(described, key=lambda name: described[name][2]):
            offset = described[name][2]
            if offset < end:
                raise self.error(f"tensors {previous} and {name} overlap; the file is damaged")
            end, previous = offset + weights[name].nbytes, name
