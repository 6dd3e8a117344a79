"""The safetensors container: a JSON header, then the bytes of the tensors.

Format: https://github.com/huggingface/safetensors (README, "Format"). Read here rather than through its package because
weights stay memory-mapped bytes, bfloat16 included, which numpy arrays cannot express.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.recode import encoded_pieces, float_type
from puna.errors import CheckpointError
from puna.tensor import Weight, quant_type

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000
_MAX_DIMENSIONS = 8
_COMPARE_BYTES = 1 << 24
_FLOATS = ("F32", "F16", "BF16")
# Bytes of a number; the types that quantized folders use beside floats.
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}
_NUMPY = {"F32": "<f4", "F16": "<f2", "I8": "<i1", "U8": "<u1", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors file holds it: its type's name there, its shape, and its bytes, uint8[n].

    ``source`` is its file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    source: str = "safetensors"

    @classmethod
    def from_array(cls, name: str, array: NDArray[Any]) -> StoredTensor:
        """Of a numpy array of a type that both have."""
        dtype = next(key for key, code in _NUMPY.items() if np.dtype(code) == array.dtype)
        return cls(name, dtype, array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    @property
    def is_float(self) -> bool:
        """Whether it is a weight as it is, not a part of a quantized one."""
        return self.dtype in _FLOATS and len(self.shape) > 0

    def weight(self) -> Weight:
        """As a weight of floats. Raises CheckpointError for other types and for a number without dimensions."""
        if self.dtype not in _FLOATS:
            raise CheckpointError(
                f"{self.source}: {self.name} has dtype {self.dtype!r}; supported: {', '.join(_FLOATS)}"
            )
        if not self.shape:
            raise CheckpointError(
                f"{self.source}: {self.name}: shape must be a list of 1 to {_MAX_DIMENSIONS} sizes, found []"
            )
        kind = quant_type(self.dtype)
        return Weight(self.name, self.shape, kind, self.data.reshape(*self.shape[:-1], kind.row_bytes(self.shape[-1])))

    def array(self) -> NDArray[Any]:
        """As numpy has it; BF16 as float32, and F8_E4M3 as its bytes, uint8."""
        if self.dtype == "BF16":
            return quant_type("BF16").decode(self.data).reshape(self.shape)
        return np.ascontiguousarray(self.data).view(_NUMPY.get(self.dtype, "u1")).reshape(self.shape)

    def rename(self, name: str) -> StoredTensor:
        return replace(self, name=name)

    def equals(self, other: StoredTensor) -> bool:
        """Whether both are stored identically; compared piecewise, for they may be larger than memory."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        pieces = (slice(start, start + _COMPARE_BYTES) for start in range(0, len(self.data), _COMPARE_BYTES))
        return all(np.array_equal(self.data[piece], other.data[piece]) for piece in pieces)


def read_safetensors(path: Path) -> dict[str, Weight]:
    """Map a file of floats. Raises CheckpointError for tensors of other types, and as map_safetensors."""
    return {name: tensor.weight() for name, tensor in map_safetensors(path).items()}


def map_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Map every tensor of one file. Raises CheckpointError when the header contradicts itself or the file's size."""
    size = path.stat().st_size
    if size < 8:
        raise CheckpointError(f"{path}: not a safetensors file: it has {size} bytes, fewer than its length field")
    data = np.memmap(path, dtype=np.uint8, mode="r")
    header_size = int.from_bytes(data[:8].tobytes(), "little")
    if header_size > min(_MAX_HEADER, size - 8):
        raise CheckpointError(
            f"{path}: the safetensors header claims {header_size} bytes, but the file has {size} "
            f"and a header at most {_MAX_HEADER}; the file is truncated or of another format"
        )
    header = _parse_header(path, data[8 : 8 + header_size].tobytes())
    header.pop("__metadata__", None)
    buffer = np.asarray(data[8 + header_size :])
    return _map_tensors(path, header, buffer)


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: the safetensors header {error}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON; the file is damaged") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise CheckpointError(f"names {twice!r} twice")
    return unique


def _map_tensors(path: Path, header: dict[str, Any], buffer: NDArray[np.uint8]) -> dict[str, StoredTensor]:
    entries = []
    for name, info in header.items():
        dtype, shape, start, end = _entry(path, name, info)
        expected = math.prod(shape) * _ITEM_BYTES[dtype]
        if end - start != expected:
            raise CheckpointError(
                f"{path}: {name}: {dtype} of shape {shape} needs {expected} bytes, its offsets span {end - start}"
            )
        entries.append((start, end, name, dtype, shape))
    entries.sort(key=lambda entry: entry[:2])
    position = 0
    for start, end, name, _, _ in entries:
        if start != position:
            problem = "overlaps the tensor before it" if start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: {name} {problem}: it starts at byte {start}, expected {position}")
        position = end
    if position != len(buffer):
        raise CheckpointError(
            f"{path}: the tensors need {position} bytes after the header, the file has {len(buffer)}; "
            "it is truncated or padded: fetch it again"
        )
    return {
        name: StoredTensor(name, dtype, shape, buffer[start:end], str(path))
        for start, end, name, dtype, shape in entries
    }


def _entry(path: Path, name: str, info: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(info, dict):
        raise CheckpointError(f"{path}: {name}: its header entry is not a JSON object")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype!r}; supported: {', '.join(_ITEM_BYTES)}")
    if not _whole_numbers(shape) or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"{path}: {name}: shape must be a list of at most {_MAX_DIMENSIONS} sizes, found {shape!r}"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: {name}: data_offsets must be a start and an end, found {offsets!r}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def write_safetensors(
    folder: Path, tensors: Mapping[str, Weight], weight_type: str | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write ``model.safetensors``, or numbered shards and their index, into an existing folder, one tensor at a time.

    ``weight_type`` (F32, F16, BF16) re-encodes the matrices; None keeps floats and turns quantized weights into F16.
    """

    def entries() -> Iterator[_Entry]:
        for name in tensors:
            weight = tensors[name]
            kind = float_type(weight, weight_type)
            nbytes = math.prod(weight.shape[:-1]) * kind.row_bytes(weight.shape[-1])
            yield _Entry(name, kind.name, weight.shape, nbytes, encoded_pieces(weight, kind))

    _write(folder, entries(), _room(tensors), max_shard_bytes)


def write_stored(
    folder: Path, names: Iterable[str], tensors: Iterable[StoredTensor], max_shard_bytes: int = 5 * 10**9
) -> None:
    """As write_safetensors, tensors as they are; ``names`` are all that may come, known beforehand."""
    entries = (_Entry(t.name, t.dtype, t.shape, t.data.nbytes, (t.data,)) for t in tensors)
    _write(folder, entries, _room(names), max_shard_bytes)


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Iterable[NDArray[np.uint8]]


def _room(names: Iterable[str]) -> int:
    """Bytes of the longest header. Types are known only as tensors stream by, so room for it is left at the front."""
    return sum(len(json.dumps(name)) + 160 for name in names) + 64


def _write(folder: Path, entries: Iterable[_Entry], room: int, max_shard_bytes: int) -> None:
    shards: list[_Shard] = []
    try:
        for entry in entries:
            if not shards or (shards[-1].position and shards[-1].position + entry.nbytes > max_shard_bytes):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(folder / f"shard-{len(shards)}.part", room))
            shards[-1].add(entry)
    finally:
        if shards:
            shards[-1].close()
    if len(shards) == 1:
        shards[0].path.rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(folder / file_name)
        weight_map |= dict.fromkeys(shard.header, file_name)
    index = {"metadata": {"total_size": sum(shard.position for shard in shards)}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Shard:
    """One safetensors file in the making; its header is written last, into the room left for it."""

    def __init__(self, path: Path, room: int) -> None:
        self.path = path
        self.room = -(-room // 64) * 64
        self.header: dict[str, Any] = {}
        self.position = 0
        self.file = path.open("wb")
        self.file.seek(8 + self.room)

    def add(self, entry: _Entry) -> None:
        start = self.position
        for piece in entry.pieces:
            self.file.write(piece.data if piece.flags.c_contiguous else np.ascontiguousarray(piece).data)
            self.position += piece.nbytes
        offsets = [start, self.position]
        self.header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}

    def close(self) -> None:
        if self.file.closed:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}} | self.header, separators=(",", ":")).encode()
        assert len(header) <= self.room
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.close()
