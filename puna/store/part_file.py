"""A file that is being downloaded, with the digest of what it holds."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from types import TracebackType

from puna.store.disk import CHUNK


class PartFile:
    """Bytes on the disk, appended to; beside it ``.etag`` keeps the server's name for the version they belong to.

    ``size`` is what it holds now, ``longest`` the most it ever held. The caller holds the lock on the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._etag_path = path.with_suffix(".etag")
        self._file = path.open("a+b")
        self._digest = hashlib.sha256()
        self._file.seek(0)
        self.size = 0
        while chunk := self._file.read(CHUNK):
            self._digest.update(chunk)
            self.size += len(chunk)
        self.longest = self.size

    def __enter__(self) -> PartFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def etag(self) -> str | None:
        """The strong ETag of the version that the bytes belong to."""
        try:
            return self._etag_path.read_text(encoding="latin-1")
        except FileNotFoundError:
            return None

    def write(self, chunk: bytes) -> None:
        self._file.write(chunk)
        self._digest.update(chunk)
        self.size += len(chunk)
        self.longest = max(self.longest, self.size)

    def restart(self, etag: str | None) -> None:
        """Forget the bytes; those to come belong to ``etag``. In this order: a kill between leaves an empty file."""
        self._file.truncate(0)
        self._file.flush()
        self._digest = hashlib.sha256()
        self.size = 0
        if etag is not None and etag.startswith('"'):  # a weak one (W/"…") does not promise equal bytes
            self._etag_path.write_text(etag, encoding="latin-1")
        else:
            self._etag_path.unlink(missing_ok=True)

    def sync(self) -> None:
        """Flush everything to the disk; the ETag has served."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._etag_path.unlink(missing_ok=True)
