"""The safetensors container: a JSON header, then the bytes of the tensors.

Format: https://github.com/huggingface/safetensors (README, "Format"). Read here rather than through its package because
weights stay memory-mapped bytes, bfloat16 included, which numpy arrays cannot express.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.recode import encoded_pieces, float_type
from puna.errors import CheckpointError
from puna.tensor import QuantType, Weight, quant_type

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000
_MAX_DIMENSIONS = 8
_TYPES = {"F32": quant_type("F32"), "F16": quant_type("F16"), "BF16": quant_type("BF16")}


def read_safetensors(path: Path) -> dict[str, Weight]:
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


def _map_tensors(path: Path, header: dict[str, Any], buffer: NDArray[np.uint8]) -> dict[str, Weight]:
    entries = []
    for name, info in header.items():
        kind, shape, start, end = _entry(path, name, info)
        expected = math.prod(shape) // kind.block_size * kind.block_bytes
        if end - start != expected:
            raise CheckpointError(
                f"{path}: {name}: {kind.name} of shape {shape} needs {expected} bytes, its offsets span {end - start}"
            )
        entries.append((start, end, name, kind, shape))
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
        name: Weight(name, shape, kind, buffer[start:end].reshape(*shape[:-1], kind.row_bytes(shape[-1])))
        for start, end, name, kind, shape in entries
    }


def _entry(path: Path, name: str, info: Any) -> tuple[QuantType, tuple[int, ...], int, int]:
    if not isinstance(info, dict):
        raise CheckpointError(f"{path}: {name}: its header entry is not a JSON object")
    dtype, shape, offsets = info.get("dtype"), info.get("shape"), info.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _TYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype!r}; supported: {', '.join(_TYPES)}")
    if not _whole_numbers(shape) or not 0 < len(shape) <= _MAX_DIMENSIONS:
        raise CheckpointError(f"{path}: {name}: shape must be a list of 1 to {_MAX_DIMENSIONS} sizes, found {shape!r}")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{path}: {name}: data_offsets must be a start and an end, found {offsets!r}")
    return _TYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def write_safetensors(
    folder: Path, tensors: Mapping[str, Weight], weight_type: str | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write ``model.safetensors``, or numbered shards and their index, into an existing folder, one tensor at a time.

    ``weight_type`` (F32, F16, BF16) re-encodes the matrices; None keeps floats and turns quantized weights into F16.
    """
    # Types are known only as the tensors stream by, so room for the header is left at the front and padded with spaces.
    room = sum(len(json.dumps(name)) + 160 for name in tensors) + 64
    shards: list[_Shard] = []
    try:
        for name in tensors:
            weight = tensors[name]
            kind = float_type(weight, weight_type)
            nbytes = math.prod(weight.shape[:-1]) * kind.row_bytes(weight.shape[-1])
            if not shards or (shards[-1].position and shards[-1].position + nbytes > max_shard_bytes):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(folder / f"shard-{len(shards)}.part", room))
            shards[-1].add(name, weight.shape, kind, encoded_pieces(weight, kind))
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

    def add(self, name: str, shape: tuple[int, ...], kind: QuantType, pieces: Iterable[NDArray[np.uint8]]) -> None:
        start = self.position
        for piece in pieces:
            self.file.write(piece.data if piece.flags.c_contiguous else np.ascontiguousarray(piece).data)
            self.position += piece.nbytes
        self.header[name] = {"dtype": kind.name, "shape": list(shape), "data_offsets": [start, self.position]}

    def close(self) -> None:
        if self.file.closed:
            return
        header = json.dumps({"__metadata__": {"format": "pt"}} | self.header, separators=(",", ":")).encode()
        assert len(header) <= self.room
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.close()
