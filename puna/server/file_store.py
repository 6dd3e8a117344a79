"""Files that clients upload, and those that batches make for them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from puna.server.records import Record, Records, abandoned, new_id, private_file, private_folder, state_errors
from puna.store.disk import sync_folder


class FileStore:
    """``<id>.json`` says what a file is and ``<id>.data`` is its content. A file is there when its record is."""

    def __init__(self, home: Path) -> None:
        """``home`` is the store's."""
        self.records = Records(home / "server" / "files", "file")

    @contextmanager
    def create(self, file_id: str | None = None) -> Iterator[NewFile]:
        """A file to be written in the block and kept by its ``keep``; otherwise nothing is left of it."""
        folder = self.records.folder
        with state_errors(folder):
            private_folder(folder)
            new = NewFile(self.records, file_id or new_id("file-"))
            try:
                yield new
            finally:
                new.close()

    def content(self, tenant: str, file_id: str) -> Path:
        """Where a file's bytes lie. Raises NotFoundError."""
        self.record(tenant, file_id)
        return self._data(file_id)

    def record(self, tenant: str, file_id: str) -> Record:
        """What is known of a file. Raises NotFoundError for one that has expired, too."""
        found = self.records.read(tenant, file_id)
        if _expired(found):
            self.delete(tenant, file_id)
            raise self.records.missing(file_id)
        return found

    def of(self, tenant: str) -> list[Record]:
        """A tenant's files, the newest first."""
        return [record for record in self.records.of(tenant) if not _expired(record)]

    def delete(self, tenant: str, file_id: str) -> None:
        """Raises NotFoundError."""
        self.records.delete(tenant, file_id)
        with state_errors(self.records.folder):
            self._data(file_id).unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what killed servers left half written and what has expired."""
        for tenant, record in self.records.all():
            if _expired(record):
                self.delete(tenant, record["id"])
        self.records.clean()
        with state_errors(self.records.folder):
            for path in self.records.folder.glob("*.data"):
                if not path.with_suffix(".json").exists() and abandoned(path):
                    path.unlink(missing_ok=True)

    def _data(self, file_id: str) -> Path:
        return self.records.folder / f"{file_id}.data"


class NewFile:
    """A file on its way. ``stream`` takes its bytes."""

    def __init__(self, records: Records, file_id: str) -> None:
        self._records = records
        self.id = file_id
        self._temporary = records.folder / f".{file_id}.data.partial"
        self._temporary.unlink(missing_ok=True)
        self.stream: BinaryIO = os.fdopen(private_file(self._temporary), "wb")

    def keep(self, tenant: str, filename: str, purpose: str, expires_at: int | None = None) -> Record:
        """Make it one of the tenant's files, durably."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        size = self.stream.tell()
        self.stream.close()
        os.replace(self._temporary, self._records.folder / f"{self.id}.data")
        sync_folder(self._records.folder)
        record: Record = {
            "id": self.id,
            "object": "file",
            "bytes": size,
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        if expires_at is not None:
            record["expires_at"] = expires_at
        self._records.write(tenant, record)
        return record

    def close(self) -> None:
        self.stream.close()
        self._temporary.unlink(missing_ok=True)


def _expired(record: Record) -> bool:
    return bool(record.get("expires_at", float("inf")) <= time.time())
