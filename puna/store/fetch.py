"""One remote file into the store's staging place."""

from __future__ import annotations

import hashlib
from contextlib import suppress

from puna.errors import SourceError, StoreError
from puna.store.blobs import Blobs
from puna.store.disk import digest_file, disk_errors
from puna.store.http_download import Http, Remote, shown
from puna.store.importing import check_magic
from puna.store.manifest import StoredFile
from puna.store.progress import Progress


def fetch(blobs: Blobs, http: Http, remote: Remote, progress: Progress) -> StoredFile:
    """Download a file unless its bytes are here, and stage it. Two processes asking for the same file share the work.

    Raises SourceError, StoreError.
    """
    identity = remote.sha256 or hashlib.sha256(remote.url.encode()).hexdigest()

    def on_wait() -> None:
        progress.status(f"waiting for another Puna process that is downloading {remote.file}")

    with disk_errors(blobs.partial), blobs.receiving(identity, on_wait) as part:
        here = _already_here(blobs, remote)
        if here is not None:
            return here
        sha256, size = http.download(remote, part, progress)
        if remote.file.lower().endswith(".gguf"):
            try:
                check_magic(part, shown(remote.url))
            except StoreError as error:
                part.unlink()
                raise SourceError(str(error)) from None
        blobs.stage(part, sha256)
    return StoredFile(remote.file, sha256, size)


def _already_here(blobs: Blobs, remote: Remote) -> StoredFile | None:
    if remote.sha256 is None:
        return None
    if remote.size is not None:
        stored = StoredFile(remote.file, remote.sha256, remote.size)
        return stored if blobs.present(stored) else None
    for path in blobs.places(remote.sha256):  # no size to tell whether the bytes are sound: their digest must
        with suppress(FileNotFoundError):  # not here, or just moved on to the next place
            if digest_file(path) == remote.sha256:
                return StoredFile(remote.file, remote.sha256, path.stat().st_size)
    return None
