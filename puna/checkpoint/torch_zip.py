"""The zip archive that ``torch.save`` writes, read and written without torch.

Format: ``torch/serialization.py`` and ``caffe2/serialize/inline_container.h``: stored (uncompressed) entries
``<root>/data.pkl``, ``<root>/data/<key>`` for each storage, ``<root>/version`` and ``<root>/byteorder``.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.pickle_reader import MAX_PICKLE_BYTES, STORAGE_TYPES, StoredTensor, unpickle
from puna.errors import CheckpointError
from puna.tensor import QuantType, Weight, quant_type

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_MAX_ENTRIES = 200_000
_ALIGNMENT = 64


class TorchFile(Mapping[str, Weight]):
    """The tensors of one ``.pth`` file by name, each mapped when asked for.

    Raises CheckpointError for anything but a flat dictionary of float tensors. A tensor that is not contiguous is
    copied when asked for; all others are views of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries = _stored_entries(path)
        roots = {name.split("/", 1)[0] for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")}
        if len(roots) != 1:
            raise CheckpointError(f"{path}: expected one data.pkl in the archive, found {len(roots)}; not a torch file")
        self._root = roots.pop()
        self._data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        if f"{self._root}/byteorder" in self._entries and self._bytes("byteorder", 16) != b"little":
            raise CheckpointError(f"{path}: the numbers are big-endian; save the file again on a little-endian machine")
        content = unpickle(self._bytes("data.pkl", MAX_PICKLE_BYTES), str(path))
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: expected a dictionary of tensors, found another kind of object")
        self._tensors: dict[str, StoredTensor] = {}
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
                raise CheckpointError(f"{path}: entry {str(name)[:200]!r} is not a float tensor")
            self._check_storage(name, tensor)
            self._tensors[name] = tensor

    def __getitem__(self, name: str) -> Weight:
        tensor = self._tensors[name]
        kind = quant_type(tensor.storage.type_name)
        start, _ = self._entries[f"{self._root}/data/{tensor.storage.key}"]
        raw = self._data[start : start + tensor.storage.count * kind.block_bytes]
        shape = tensor.shape
        numbers = math.prod(shape)
        if numbers == 0 or _is_contiguous(shape, tensor.strides):
            first = tensor.offset * kind.block_bytes if numbers else 0
            data = raw[first : first + numbers * kind.block_bytes].reshape(*shape[:-1], kind.row_bytes(shape[-1]))
        else:
            units = np.lib.stride_tricks.as_strided(
                raw[tensor.offset * kind.block_bytes :],
                shape=(*shape, kind.block_bytes),
                strides=(*(stride * kind.block_bytes for stride in tensor.strides), 1),
                writeable=False,
            )
            data = np.ascontiguousarray(units).reshape(*shape[:-1], kind.row_bytes(shape[-1]))
        return Weight(name, shape, kind, data)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def same_storage(self, one: str, other: str) -> bool:
        """Whether two names stand for the very same bytes."""
        return self._tensors[one] == self._tensors[other]

    def _bytes(self, name: str, limit: int) -> bytes:
        start, size = self._entries[f"{self._root}/{name}"]
        if size > limit:
            raise CheckpointError(f"{self.path}: {name} has {size} bytes, expected at most {limit}")
        return self._data[start : start + size].tobytes()

    def _check_storage(self, name: str, tensor: StoredTensor) -> None:
        entry = self._entries.get(f"{self._root}/data/{tensor.storage.key}")
        needed = tensor.storage.count * quant_type(tensor.storage.type_name).block_bytes
        if entry is None:
            raise CheckpointError(f"{self.path}: the numbers of {name} are missing from the archive")
        if entry[1] < needed:
            raise CheckpointError(
                f"{self.path}: {name} needs a storage of {needed} bytes, the archive holds {entry[1]}; "
                "the file is damaged: fetch it again"
            )


def _contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """The stride of an axis of one number is never used, and torch leaves anything there."""
    expected = _contiguous_strides(shape)
    return all(size == 1 or a == b for size, a, b in zip(shape, strides, expected, strict=True))


def _stored_entries(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of the bytes of every archive entry."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
            raise CheckpointError(
                f"{path}: this is torch's file format from before version 1.6; load it with torch and save it again"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, OSError) as error:
            raise CheckpointError(f"{path}: not a torch file, or truncated: {error}") from None
        if len(members) > _MAX_ENTRIES:
            raise CheckpointError(f"{path}: the archive has {len(members)} entries; a weights file has a few thousand")
        entries: dict[str, tuple[int, int]] = {}
        for member in members:
            if member.filename in entries:
                raise CheckpointError(f"{path}: the archive holds {member.filename[:200]!r} twice")
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise CheckpointError(
                    f"{path}: {member.filename[:200]!r} is compressed; torch stores weights as they are"
                )
            file.seek(min(max(member.header_offset, 0), size))
            local = file.read(30)
            if len(local) < 30 or local[:4] != b"PK\x03\x04":
                raise CheckpointError(f"{path}: the archive's directory is damaged at {member.filename[:200]!r}")
            name_length, extra_length = struct.unpack("<HH", local[26:])
            start = member.header_offset + 30 + name_length + extra_length
            if start + member.file_size > size:
                raise CheckpointError(
                    f"{path}: {member.filename[:200]!r} lies past the end of the file; it is truncated"
                )
            entries[member.filename] = (start, member.file_size)
    return entries


class TorchWriter:
    """Writes an archive that ``torch.load(weights_only=True)`` reads, one tensor at a time. Close to finish it."""

    def __init__(self, path: Path) -> None:
        self._root = path.stem
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._tensors: list[tuple[str, str, int, tuple[int, ...], str]] = []
        self._keys: dict[str, str] = {}

    def add(self, name: str, shape: tuple[int, ...], kind: QuantType, pieces: Iterable[NDArray[np.uint8]]) -> None:
        key = str(len(self._keys))
        self._keys[name] = key
        with self._open(f"data/{key}") as entry:
            for piece in pieces:
                entry.write(np.ascontiguousarray(piece).data)
        self._tensors.append((name, kind.name, math.prod(shape), shape, key))

    def add_alias(self, name: str, existing: str) -> None:
        """A second name for the numbers of ``existing``, stored once."""
        _, type_name, count, shape, key = next(tensor for tensor in self._tensors if tensor[0] == existing)
        self._tensors.append((name, type_name, count, shape, key))

    def close(self) -> None:
        for name, content in (
            ("data.pkl", _pickle(self._tensors)),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            with self._open(name) as entry:
                entry.write(content)
        self._archive.close()

    def _open(self, name: str) -> Any:
        info = zipfile.ZipInfo(f"{self._root}/{name}")
        # The extra field pads the data to 64 bytes, as torch does; zipfile itself adds 20 bytes of zip64 sizes.
        assert self._archive.fp is not None
        start = self._archive.fp.tell() + 30 + len(info.filename.encode()) + 20 + 4
        padding = -start % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        return self._archive.open(info, "w", force_zip64=True)


def _pickle(tensors: list[tuple[str, str, int, tuple[int, ...], str]]) -> bytes:
    """The pickle (protocol 2) of a dictionary of tensors: what ``torch.save`` writes, without the memo."""
    storages = {type_name: name for name, type_name in STORAGE_TYPES.items()}
    out = [b"\x80\x02}("]
    for name, type_name, count, shape, key in tensors:
        storage = (
            b"(" + _text("storage") + _global(storages[type_name]) + _text(key) + _text("cpu") + _int(count) + b"tQ"
        )
        hooks = _global("collections.OrderedDict") + b")R"
        arguments = storage + _int(0) + _ints(shape) + _ints(_contiguous_strides(shape)) + b"\x89" + hooks
        out.append(_text(name) + _global("torch._utils._rebuild_tensor_v2") + b"(" + arguments + b"tR")
    return b"".join(out) + b"u."


def _text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _ints(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"
