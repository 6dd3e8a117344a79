"""Files by digest: received in ``partial/``, then moved into ``blobs/`` in one step.

A blob moves in only together with the manifest that names it, under the store's lock. The collection of garbage
therefore never meets a blob that some process is about to use: until that moment it lies in ``partial/``, whole and
checked.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from puna.store.disk import sync_file, sync_folder
from puna.store.lock import file_lock
from puna.store.manifest import StoredFile

PARTIAL_LIFETIME = 7 * 24 * 3600
_PREFIX = "sha256-"


class Blobs:
    """The two folders of bytes below the store's home."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "blobs"
        self.partial = home / "partial"

    def path(self, sha256: str) -> Path:
        """Where the blob of that digest lies, or would."""
        return self.folder / (_PREFIX + sha256)

    def staged(self, sha256: str) -> Path:
        """Where a whole, checked file of that digest waits for its manifest."""
        return self.partial / (_PREFIX + sha256)

    def places(self, sha256: str) -> tuple[Path, Path]:
        """Where to look for a digest, in the order of its life, so that a file that moves meanwhile is not missed."""
        return self.staged(sha256), self.path(sha256)

    def present(self, file: StoredFile) -> bool:
        """Whether the bytes are here, published or staged, judged by their size."""
        return any(_size(path) == file.size for path in self.places(file.sha256))

    @contextmanager
    def receiving(self, key: str, on_wait: Callable[[], None]) -> Iterator[Path]:
        """Hold the right to write ``KEY.part`` and give its path. An earlier attempt may have left bytes there."""
        with file_lock(self.partial / f"{key}.lock", on_wait, discard=True):
            yield self.partial / f"{key}.part"

    def stage(self, part: Path, sha256: str) -> None:
        """Declare a received file whole: the caller has checked its digest."""
        sync_file(part)
        os.replace(part, self.staged(sha256))
        sync_folder(self.partial)

    def publish(self, file: StoredFile) -> bool:
        """Move a staged file in. False when neither place has it. The caller holds the store's lock."""
        target, staged = self.path(file.sha256), self.staged(file.sha256)
        if _size(target) == file.size:
            staged.unlink(missing_ok=True)
            return True
        if _size(staged) != file.size:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        os.replace(staged, target)
        sync_folder(self.folder)
        return True

    def collect(self, referenced: set[str]) -> int:
        """Delete the blobs that nothing names; return the bytes freed. The caller holds the store's lock."""
        freed = 0
        for path in self.folder.glob(_PREFIX + "*"):
            if path.name.removeprefix(_PREFIX) not in referenced:
                status = path.stat()
                path.unlink()
                if status.st_nlink == 1:  # else the file it was imported from keeps the bytes
                    freed += status.st_size
        return freed

    def collect_partial(self) -> None:
        """Delete what abandoned downloads left behind a week ago. A live one changes its .part all the time."""
        groups: dict[str, list[Path]] = {}
        for path in self.partial.glob("*"):
            groups.setdefault(path.stem, []).append(path)
        oldest = time.time() - PARTIAL_LIFETIME
        for paths in groups.values():
            if all(_changed(path) < oldest for path in paths):
                for path in paths:
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0
