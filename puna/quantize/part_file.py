"""A file that is written tensor by tensor and, when that is cut off, continued: never half there under its name.

Beside the destination lie the file so far and a journal: one JSON line with the identity of what is being written, then
one for each finished tensor with the digest of its bytes. Whoever continues reads those bytes again and takes only what
has its digest, so neither a kill nor a crash of the machine needs to be foreseen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 22


class PartFile:
    """The unfinished file of ``destination``; ``identity`` differs wherever its bytes would.

    Use as a context: an exception removes it, being killed or interrupted (Ctrl-C) leaves it to be continued.
    ``finish`` gives it its name. Raises OSError, and CheckpointError while another process writes the same.
    """

    def __init__(self, destination: Path, identity: str, header: bytes, size: int) -> None:
        self.destination = destination.absolute()
        self.path = self.destination.with_name(f".{destination.name}.part")
        self._journal_path = self.destination.with_name(f".{destination.name}.part.journal")
        self._identity = hashlib.sha256(identity.encode() + header).hexdigest()
        self._header = header
        self._size = size

    def __enter__(self) -> PartFile:
        self.destination.parent.mkdir(parents=True, exist_ok=True)
        self._finished = self._read_journal()
        self._file = self.path.open("r+b" if self._finished else "w+b")
        self._journal = self._journal_path.open("a" if self._finished else "w", encoding="utf-8")
        if not self._finished:
            self._note({"writes": self._identity})
        self._file.truncate(self._size)
        self._file.write(self._header)
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._journal.close()
        if kind is not None and issubclass(kind, Exception):
            self._remove()

    def has(self, name: str, start: int, size: int) -> bool:
        """Whether an earlier run wrote this tensor's bytes, and they are still those."""
        digest = self._finished.get(name)
        if digest is None:
            return False
        found = hashlib.sha256()
        self._file.seek(start)
        while size > 0 and (chunk := self._file.read(min(size, _CHUNK))):
            found.update(chunk)
            size -= len(chunk)
        return found.hexdigest() == digest

    def write(self, name: str, start: int, pieces: Iterable[NDArray[np.uint8]]) -> int:
        """Write a tensor's bytes, given in pieces, and return how many they are."""
        digest = hashlib.sha256()
        self._file.seek(start)
        for piece in pieces:
            data = np.ascontiguousarray(piece).reshape(-1).data
            self._file.write(data)
            digest.update(data)
        self._file.flush()
        self._note({"tensor": name, "sha256": digest.hexdigest()})
        return self._file.tell() - start

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.path, self.destination)
        self._journal.close()
        self._remove()

    def _note(self, entry: dict[str, str]) -> None:
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()

    def _read_journal(self) -> dict[str, str]:
        """The digests of finished tensors, when the files there are of the same work."""
        if not self.path.exists():
            return {}
        try:
            lines = self._journal_path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return {}
        entries: list[Any] = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:  # the line that was being written when the program ended
                break
        if not entries or entries[0] != {"writes": self._identity}:
            return {}
        finished = (entry for entry in entries[1:] if isinstance(entry, dict))
        return {str(entry.get("tensor")): str(entry.get("sha256")) for entry in finished}

    def _remove(self) -> None:
        for path in (self.path, self._journal_path):
            with suppress(OSError):
                path.unlink()
