"""What a batch has done so far: a file of its finished lines, each on the disk before the next counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from puna.server.records import private_folder, state_errors
from puna.store.disk import sync_folder


class Journal:
    """Lines of JSON with a ``custom_id``. A line that was cut off by a kill is dropped when the journal is opened.

    Only the holder of the batch's lock may open it. Raises CapacityError when the disk is full; nothing is lost then.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done: set[str] = set()
        self.failed = 0
        with state_errors(path):
            private_folder(path.parent)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            sync_folder(path.parent)
            self._size = self._recover()

    def append(self, custom_id: str, line: bytes, failed: bool) -> None:
        """Add a finished line (no line break in it), durably."""
        data = line + b"\n"
        with state_errors(self._path):
            try:
                written = 0
                while written < len(data):
                    written += os.pwrite(self._file, data[written:], self._size + written)
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, self._size)
                raise
        self._size += len(data)
        self.done.add(custom_id)
        self.failed += failed

    def lines(self) -> Iterator[tuple[bytes, bool]]:
        """Every line with its line break, and whether it failed."""
        with self._path.open("rb") as file:
            for line in file:
                yield line, _failed(json.loads(line))

    def close(self) -> None:
        os.close(self._file)

    def _recover(self) -> int:
        """The size of what is whole; the rest is cut off."""
        size = 0
        with self._path.open("rb") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                size += len(line)
                self.done.add(entry["custom_id"])
                self.failed += _failed(entry)
        os.ftruncate(self._file, size)
        return size


def _failed(entry: dict[str, dict[str, int] | None]) -> bool:
    response = entry["response"]
    return response is None or response["status_code"] != 200
