"""A file of packed matrices, which the native ops map instead of packing a model again at every start.

Layout: MAGIC, the length of the header (uint32, little-endian), the header's sha256, the header (JSON), and from the
next multiple of ALIGNMENT on the matrices, each at a multiple of ALIGNMENT. The header names the panel layout of
csrc/panel.hpp, the model's identity as the caller gave it, the file's size, and of each matrix its name, encoding,
shape and place.

Opening checks the header against its digest, the size and every place; the matrices' bytes are read only when they are
computed with. Wrong bytes there give wrong numbers, never a read outside the file.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from puna.errors import CheckpointError

MAGIC = b"PUNAPAC1"
ALIGNMENT = 64
MAX_HEADER_BYTES = 1 << 24
_PREFIX = struct.Struct("<8sI32s")
_OFFSET_DIGITS = 20

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class PackedMatrix:
    """One matrix of the file: ``offset`` and ``size`` in bytes, from the file's beginning."""

    name: str
    type: str
    rows: int
    columns: int
    offset: int
    size: int


class PackedFile:
    """The matrices of a mapped file, by name."""

    def __init__(self, path: Path, buffer: mmap.mmap, matrices: dict[str, PackedMatrix]) -> None:
        self.path = path
        self.matrices = matrices
        self._bytes = np.frombuffer(buffer, np.uint8)

    def panels(self, matrix: PackedMatrix) -> Bytes:
        """The bytes of one of its matrices, read-only. They keep the mapping alive."""
        return self._bytes[matrix.offset : matrix.offset + matrix.size]


def read_packed(path: Path, layout: int, source: str) -> PackedFile:
    """Map a packed file of that panel layout and that model. Raises CheckpointError for any other."""
    try:
        with path.open("rb") as file:
            header = _read_header(path, file)
            if header.get("layout") != layout:
                raise packed_error(path, f"its panel layout is {header.get('layout')!r:.50}, this Puna has {layout}")
            if header.get("source") != source:
                raise packed_error(path, "it was made from another model, or the model has changed since")
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise packed_error(path, f"it cannot be read ({error.strerror or error})") from error
    if header.get("size") != len(buffer):
        raise packed_error(path, f"it has {len(buffer)} bytes, its header says {header.get('size')!r:.50}")
    return PackedFile(path, buffer, _matrices(path, header.get("matrices"), len(buffer)))


def write_packed(
    path: Path, layout: int, source: str, matrices: Iterable[tuple[PackedMatrix, Callable[[], Bytes]]]
) -> None:
    """Write a packed file, holding one matrix at a time: each with what makes its panels, its offset not yet known.

    ``path`` holds nothing of use until this returns: the caller renames it into place. Raises OSError.
    """
    planned = list(matrices)
    room = len(_encode(layout, source, 0, [matrix for matrix, _ in planned])) + _OFFSET_DIGITS * (len(planned) + 1)
    offset = _aligned(_PREFIX.size + room)
    placed = []
    with path.open("wb") as file:
        for matrix, make in planned:
            panels = make()
            assert panels.nbytes == matrix.size
            placed.append(PackedMatrix(**{**asdict(matrix), "offset": offset}))
            file.seek(offset)
            file.write(panels.data)
            offset = _aligned(offset + matrix.size)
        file.truncate(offset)
        header = _encode(layout, source, offset, placed).ljust(room)
        file.seek(0)
        file.write(_PREFIX.pack(MAGIC, len(header), sha256(header).digest()) + header)


def is_packed(path: Path) -> bool:
    """Whether it is a packed file, of whatever layout and model."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def packed_error(path: Path, problem: str) -> CheckpointError:
    """Why a packed file is not used, and the remedy."""
    return CheckpointError(f"the packed file {path} is not used: {problem}; `puna pack` makes it anew")


def _encode(layout: int, source: str, size: int, matrices: list[PackedMatrix]) -> bytes:
    header = {"layout": layout, "source": source, "size": size, "matrices": [asdict(matrix) for matrix in matrices]}
    return json.dumps(header).encode()


def _read_header(path: Path, file: BinaryIO) -> dict[str, Any]:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
        raise packed_error(path, "it is no packed file of this version")
    _, length, digest = _PREFIX.unpack(prefix)
    text = file.read(length) if length <= MAX_HEADER_BYTES else b""
    if sha256(text).digest() != digest:
        raise packed_error(path, "its header is damaged")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise packed_error(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise packed_error(path, "its header is not an object")
    return header


def _matrices(path: Path, raw: Any, end: int) -> dict[str, PackedMatrix]:
    found: dict[str, PackedMatrix] = {}
    if not isinstance(raw, list):
        raise packed_error(path, "its header does not describe matrices")
    for item in raw:
        try:
            matrix = PackedMatrix(**dict(item))
        except (TypeError, ValueError):
            raise packed_error(path, "its header does not describe matrices") from None
        numbers = (matrix.rows, matrix.columns, matrix.offset, matrix.size)
        good = all(isinstance(text, str) for text in (matrix.name, matrix.type))
        good = good and all(type(number) is int and number >= 0 for number in numbers)
        good = good and matrix.offset % ALIGNMENT == 0 and matrix.offset + matrix.size <= end
        if not good or matrix.name in found:
            raise packed_error(path, f"its header describes the matrix {str(matrix.name)[:100]!a} wrongly")
        found[matrix.name] = matrix
    return found


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
