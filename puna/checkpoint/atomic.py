"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from puna.errors import CheckpointError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write a file at; renamed over ``path`` on success, deleted on any exception.

    Raises CheckpointError when the disk refuses.
    """
    with _beside(path, _remove_file) as temporary:
        yield temporary
        _sync(temporary)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path`` to fill; renamed to ``path`` on success, deleted on any exception.

    Raises CheckpointError when ``path`` is there already and not an empty folder, or when the disk refuses.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} exists already; choose another folder or remove it first")
    with _beside(path, _remove_folder) as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            path.rmdir()


@contextmanager
def _beside(path: Path, remove: Callable[[Path], None]) -> Iterator[Path]:
    path = path.absolute()
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
        if hasattr(os, "O_DIRECTORY"):
            _sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error
    finally:
        remove(temporary)


def _remove_file(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _remove_folder(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the disk hold what was written before its name appears."""
    # Windows syncs only what is open for writing; folders there cannot be opened at all.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
