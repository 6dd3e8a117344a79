"""Where the packed files of models lie, and what they must have been made from to be used.

A packed file is derived from its model and can be made anew: it belongs to no manifest and has no digest.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from puna.store.blobs import PARTIAL_LIFETIME
from puna.store.selection import companions_of

SUFFIX = ".packed"
_WEIGHTS = (".safetensors", ".pth", ".json")


class Packs:
    """The packed files of stored models: ``packed/<content digest>.packed`` below the store's home."""

    def __init__(self, home: Path) -> None:
        self.folder = home / "packed"

    def path(self, content_digest: str) -> Path:
        """Where the packed file of the model with that content lies, or would."""
        return self.folder / (content_digest + SUFFIX)

    def collect(self, contents: set[str]) -> int:
        """Delete the packs of content that no model has, and what killed processes left a week ago; return the bytes
        freed. The caller holds the store's lock.
        """
        freed = 0
        for path in self.folder.glob("*" + SUFFIX):
            if path.name.removesuffix(SUFFIX) not in contents:
                freed += _remove(path)
        for path in self.folder.glob(".*.partial"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - PARTIAL_LIFETIME:
                    freed += _remove(path)
        return freed


def packed_beside(path: Path) -> Path:
    """Where the packed file of a model outside the store lies: beside its file or folder."""
    path = path.absolute()
    return path.with_name(path.name + SUFFIX)


def path_identity(path: Path) -> str:
    """What tells a model's files outside the store from changed ones: a digest of their names, sizes and times.

    Raises OSError.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in _WEIGHTS)
    else:
        files = [path.parent / name for name in companions_of(path.name, os.listdir(path.parent))]
    facts = [(file.name, status.st_size, status.st_mtime_ns) for file in files if (status := file.stat())]
    return sha256(json.dumps(facts).encode()).hexdigest()


def make_room(folder: Path, size: int, bound: int) -> bool:
    """Delete the least recently used packs until ``size`` more bytes make at most ``bound``.

    False, and nothing deleted, when ``size`` alone is more.
    """
    if size > bound:
        return False
    packs = sorted(_used(folder))
    total = sum(held for _, held, _ in packs)
    for _, held, path in packs:
        if total + size <= bound:
            break
        _remove(path)
        total -= held
    return True


def mark_used(path: Path) -> None:
    """Note that a pack was used now: its time of change is the order in which packs are removed."""
    with suppress(OSError):  # a store that may only be read has no order to keep
        os.utime(path)


def _used(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """When each pack was last used, its size, and its path."""
    for path in folder.glob("*" + SUFFIX):
        with suppress(FileNotFoundError):
            status = path.stat()
            yield status.st_mtime, status.st_size, path


def _remove(path: Path) -> int:
    """Delete a pack and return its size; one that Windows still has mapped stays."""
    try:
        size = path.stat().st_size
        path.unlink()
    except (FileNotFoundError, PermissionError):
        return 0
    return size
