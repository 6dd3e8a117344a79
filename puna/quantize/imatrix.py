"""Importance matrices: how large each column of a linear's input is, in the two formats of llama.cpp.

Source of both: llama.cpp, tools/imatrix. The GGUF form holds ``<name>.in_sum2`` (sums of squared inputs) and
``<name>.counts`` (how many inputs); the older ``.dat`` form holds means of squares times a number of windows.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.atomic import atomic_path
from puna.checkpoint.gguf_writer import write_gguf
from puna.errors import CheckpointError
from puna.gguf_file import MAGIC, read_gguf
from puna.tensor import Weight

_SUMS, _COUNTS = ".in_sum2", ".counts"
_I32 = struct.Struct("<i")
_DEFAULT_WINDOW = 512  # llama-imatrix's, which a .dat file does not say
_FLOOR = 1e-4


@dataclass(frozen=True)
class ImportanceMatrix:
    """``means[name]`` (GGUF tensor names) is float32[columns], the mean of the squared inputs of that linear.

    ``windows`` texts of ``window`` tokens from the files ``datasets`` were read.
    """

    means: Mapping[str, NDArray[np.float32]]
    datasets: tuple[str, ...]
    windows: int
    window: int = _DEFAULT_WINDOW

    def of(self, name: str, columns: int) -> NDArray[np.float32] | None:
        """The importance of a tensor's columns, or None where nothing is known of it.

        A column that the text never used still counts a little, for other text will use it. Raises CheckpointError when
        the matrix is of another model.
        """
        mean = self.means.get(name)
        if mean is None:
            return None
        if len(mean) != columns:
            raise CheckpointError(
                f"the importance matrix has {len(mean)} columns for {name}, which has {columns}; "
                "it was made from another model"
            )
        average = float(mean.mean(dtype=np.float64))
        if average == 0:
            return None
        floored: NDArray[np.float32] = np.maximum(mean / np.float32(average), np.float32(_FLOOR))
        return floored


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Either format, told by its first bytes. Raises CheckpointError for a file that is none."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == MAGIC
        matrix = _read_gguf(path) if is_gguf else _read_dat(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    for name, mean in matrix.means.items():
        if not (np.isfinite(mean).all() and (mean >= 0).all()):
            raise CheckpointError(
                f"{path}: the importance of {name[:100]} holds numbers that are negative or not finite"
            )
    return matrix


def write_imatrix(path: Path, matrix: ImportanceMatrix) -> None:
    """The old format where the name ends in .dat, else GGUF; all or nothing. Raises CheckpointError."""
    if path.suffix == ".dat":
        _write_dat(path, matrix)
    else:
        _write_gguf(path, matrix)


def _read_gguf(path: Path) -> ImportanceMatrix:
    file = read_gguf(path)
    if file.metadata.get("general.type") != "imatrix":
        raise CheckpointError(f"{path} is a GGUF file, but not an importance matrix (its general.type is not imatrix)")
    means = {}
    for key, sums in file.tensors.items():
        if not key.endswith(_SUMS):
            continue
        name = key.removesuffix(_SUMS)
        counts = file.tensors.get(name + _COUNTS)
        if counts is None or np.prod(counts.shape) != 1 or np.prod(sums.shape) != sums.shape[-1]:
            raise CheckpointError(f"{path}: {key} must be one row and have one count; found {sums.shape}")
        count = float(counts.dequantize().reshape(-1)[0])
        if count > 0:
            means[name] = sums.dequantize().reshape(-1) / np.float32(count)
    if not means:
        raise CheckpointError(f"{path} holds no importance of any tensor")
    datasets = file.metadata.get("imatrix.datasets", [])
    windows, window = (file.metadata.get(f"imatrix.chunk_{what}", 0) for what in ("count", "size"))
    return ImportanceMatrix(means, tuple(map(str, datasets)), _whole(windows), _whole(window) or _DEFAULT_WINDOW)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _write_gguf(path: Path, matrix: ImportanceMatrix) -> None:
    tokens = max(1, matrix.windows * matrix.window)
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, mean in sorted(matrix.means.items()):
        arrays[name + _SUMS] = mean * np.float32(tokens)
        arrays[name + _COUNTS] = np.array([tokens], np.float32)
    weights = {name: Weight.from_array(name, values) for name, values in arrays.items()}
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(matrix.datasets),
        "imatrix.chunk_count": matrix.windows,
        "imatrix.chunk_size": matrix.window,
    }
    shapes = {name: weight.shape for name, weight in weights.items()}
    write_gguf(path, metadata, shapes, lambda name: (weights[name].type, [weights[name].data]))


def _read_dat(path: Path) -> ImportanceMatrix:
    """Count of entries; each: name, windows, numbers; then the windows of all and the data set's name, if any."""
    reader = _Dat(path)
    means = {}
    for _ in range(reader.count(12)):
        name = reader.text()
        windows = reader.whole()
        numbers = reader.numbers(reader.count(4))
        with np.errstate(invalid="ignore"):  # damaged numbers are told of later
            means[name] = numbers / np.float32(windows) if windows > 0 else numbers
    if not means:
        raise reader.error()
    windows, datasets = 0, tuple[str, ...]()
    if not reader.at_end:
        windows, datasets = reader.whole(), (reader.text(),)
    return ImportanceMatrix(means, datasets, windows)


class _Dat:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = path.read_bytes()
        self._at = 0

    def error(self) -> CheckpointError:
        return CheckpointError(f"{self._path} is not an importance matrix, or is damaged at byte {self._at}")

    @property
    def at_end(self) -> bool:
        return self._at == len(self._bytes)

    def take(self, size: int) -> bytes:
        if not 0 <= size <= len(self._bytes) - self._at:
            raise self.error()
        self._at += size
        return self._bytes[self._at - size : self._at]

    def whole(self) -> int:
        value: int = _I32.unpack(self.take(4))[0]
        return value

    def count(self, smallest: int) -> int:
        """A count of things of at least ``smallest`` bytes each, refused when so many cannot follow."""
        count = self.whole()
        if not 0 <= count * smallest <= len(self._bytes) - self._at:
            raise self.error()
        return count

    def text(self) -> str:
        try:
            return self.take(self.whole()).decode()
        except UnicodeDecodeError:
            raise self.error() from None

    def numbers(self, count: int) -> NDArray[np.float32]:
        return np.frombuffer(self.take(4 * count), "<f4").astype(np.float32)


def _write_dat(path: Path, matrix: ImportanceMatrix) -> None:
    windows = max(1, matrix.windows)
    parts = [_I32.pack(len(matrix.means))]
    for name, mean in sorted(matrix.means.items()):
        parts += [
            _text(name),
            _I32.pack(windows),
            _I32.pack(len(mean)),
            (mean * np.float32(windows)).astype("<f4").tobytes(),
        ]
    parts += [_I32.pack(windows), _text(matrix.datasets[-1] if matrix.datasets else "")]
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(parts))


def _text(text: str) -> bytes:
    raw = text.encode()
    return _I32.pack(len(raw)) + raw
