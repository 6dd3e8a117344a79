"""What a teacher says of each document, on disk: computed once, then mapped, by any number of runs and processes.

A folder holds, for one teacher, k and type of numbers, three files that only grow: ``ids`` (int32[N, k]) and ``logits``
(float32[N, k]) are the k largest logits at each trained token, largest first, and ``index`` says which rows are whose.
Rows are written before the entry that names them, so what a killed process leaves behind is only unused.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from puna.errors import TrainingError
from puna.store.lock import file_lock
from puna.train.data.tokens import Packed, Tokens, concatenate
from puna.train.objectives.documents import predictions
from puna.train.objectives.frozen import FrozenModel

_ENTRY = struct.Struct("<16sQII")  # the document's digest, its first row and number of rows, and their CRC-32
_ROWS_AT_ONCE = 256

Top = tuple[NDArray[np.int32], NDArray[np.float32]]


class TeacherCache:
    """Under ``folder``, in a folder of its own for the teacher that ``identity`` names. A document is known by its ids
    and its loss mask."""

    def __init__(self, folder: Path, teacher: FrozenModel, identity: str, k: int) -> None:
        name = f"{identity} {teacher.ops.dtype}"
        self._folder = folder / f"{blake2b(name.encode(), digest_size=8).hexdigest()}-top{k}"
        self._teacher, self._k = teacher, k
        self._entries: dict[bytes, tuple[int, int, int]] = {}
        self._read = 0  # bytes of the index

    def top(self, documents: Packed) -> tuple[Tensor, Tensor]:
        """Ids and logits at each trained token in the documents' order, int64[R, k] and float32[R, k].

        Documents that are new are asked of the teacher and written. Raises TrainingError for damaged files.
        """
        parts = documents.documents
        self._read_index()
        unknown = {digest: part for part in parts if (digest := _digest(part)) not in self._entries}
        if unknown:
            self._write(list(unknown), self._ask(list(unknown.values())))
        found = [self._rows(_digest(part)) for part in parts]
        ids, logits = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        device = self._teacher.ops.device
        return torch.from_numpy(ids.astype(np.int64)).to(device), torch.from_numpy(logits).to(device)

    def _ask(self, documents: Sequence[Tokens]) -> list[Top]:
        with torch.no_grad():
            found, head = predictions(self._teacher, concatenate(documents)), self._teacher.head()
            parts = [F.linear(rows, head).float().topk(self._k) for rows in torch.split(found.hidden, _ROWS_AT_ONCE)]
            logits, ids = (torch.cat([part[side] for part in parts]).cpu().numpy() for side in (0, 1))
        counts = [int(document.trained[1:].sum()) for document in documents]
        ends = np.cumsum(counts)[:-1]
        return list(zip(np.split(ids.astype(np.int32), ends), np.split(logits, ends), strict=True))

    def _write(self, digests: Sequence[bytes], tops: Sequence[Top]) -> None:
        with file_lock(self._folder / "lock", lambda: None):
            self._read_index()  # another process may have written since
            new = [(digest, top) for digest, top in zip(digests, tops, strict=True) if digest not in self._entries]
            row = max((first + count for first, count, _ in self._entries.values()), default=0)
            entries = b""
            with self._open("ids") as ids_file, self._open("logits") as logits_file:
                for file in (ids_file, logits_file):
                    file.truncate(row * self._k * 4)
                    file.seek(0, 2)
                for digest, (ids, logits) in new:
                    raw = ids.astype("<i4").tobytes(), logits.astype("<f4").tobytes()
                    ids_file.write(raw[0])
                    logits_file.write(raw[1])
                    entries += _ENTRY.pack(digest, row, len(ids), zlib.crc32(raw[1], zlib.crc32(raw[0])))
                    row += len(ids)
            with self._open("index") as index:
                index.truncate(self._read)
                index.seek(0, 2)
                index.write(entries)
            self._read_index()

    def _open(self, name: str) -> BinaryIO:
        path = self._folder / name
        path.touch()
        return path.open("r+b")

    def _read_index(self) -> None:
        """What is new in it. A last entry that is not whole yet is left for later."""
        path = self._folder / "index"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._read)
            raw = file.read()
        whole = len(raw) // _ENTRY.size * _ENTRY.size
        for digest, first, count, check in _ENTRY.iter_unpack(raw[:whole]):
            self._entries[digest] = (first, count, check)
        self._read += whole

    def _rows(self, digest: bytes) -> Top:
        first, count, check = self._entries[digest]
        if not count:
            return np.empty((0, self._k), np.int32), np.empty((0, self._k), np.float32)
        try:
            ids, logits = (
                np.memmap(self._folder / name, dtype, "r", first * self._k * 4, (count, self._k))
                for name, dtype in (("ids", "<i4"), ("logits", "<f4"))
            )
            found = zlib.crc32(logits.tobytes(), zlib.crc32(ids.tobytes()))
        except (OSError, ValueError):
            found = None
        if found != check:
            raise TrainingError(f"the teacher's logits in {self._folder} are damaged; delete that folder")
        return np.asarray(ids), np.asarray(logits)


def _digest(document: Tokens) -> bytes:
    digest = blake2b(document.ids.astype("<i4").tobytes(), digest_size=16)
    digest.update(document.trained.tobytes())
    return digest.digest()
