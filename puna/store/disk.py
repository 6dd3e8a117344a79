"""Careful file operations: all or nothing, on the disk before they count, and with errors that a user understands."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from puna.errors import StoreError
from puna.store.progress import Meter

CHUNK = 1 << 20


@contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn an OSError of the disk into a StoreError that names the place and the remedy."""
    try:
        yield
    except OSError as error:
        where = error.filename or place
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"the disk is full: {where} cannot be written; free some space and try again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StoreError(
                f"no permission for {where}; change its permissions or set PUNA_HOME to a folder that you may write"
            ) from error
        raise StoreError(f"{where}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Windows has no such call and does it by itself."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a small file all or nothing. The caller holds a lock: the temporary name is fixed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def check_space(folder: Path, wanted: int, what: str) -> None:
    """Raise StoreError when ``wanted`` more bytes do not fit on the disk of ``folder``."""
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise StoreError(
            f"{what} needs {readable_size(wanted)} more, but the disk of {folder} has {readable_size(free)} free; "
            "free some space or set PUNA_HOME to a larger disk"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def digest_file(path: Path, meter: Meter | None = None) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if meter:
                meter.update(done)
    return digest.hexdigest()


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name: a hard link, else a relative symbolic link, else (on FAT) a copy."""
    try:
        os.link(source, target)
    except OSError:
        try:
            os.symlink(os.path.relpath(source, target.parent), target)
        except OSError:
            shutil.copyfile(source, target)


def readable_size(size: int) -> str:
    """``size`` bytes as people say it: 98.4 MB."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 1000 else f"{value:.1f} {unit}"
