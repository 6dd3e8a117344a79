"""A private folder of block files, bounded in size, that several processes may use at once."""

from __future__ import annotations

import os
import re
import secrets
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from puna.errors import RequestError

Bytes = bytes | memoryview
_FILE = re.compile(r"[0-9a-f]{64}\.kv|\.[0-9a-f]{64}\.[0-9a-f]{8}\.partial")
_ABANDONED = 3600.0  # seconds after which a file that is still being written has lost its writer


class PrefixFiles:
    """Files named by a digest. One appears whole or not at all, and goes when it was used least recently.

    Nothing is synced: after a power failure a file may be damaged, which its reader has to find out in any case.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Makes the folder, for its owner alone. Raises RequestError when it can't be used, or others can read it."""
        self.folder = folder
        self.max_bytes = max_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(folder)
            self.make_room(0)
        except OSError as error:
            raise RequestError(
                f"cache_dir {folder} cannot be used: {error.strerror or error}; choose a folder you may write"
            ) from None

    def read(self, name: str, size: int) -> bytearray | None:
        """The file's bytes, or None when there is none of that size; anything else of that name is removed."""
        try:
            with open(self._path(name), "rb", opener=_open_plain) as file:
                status = os.fstat(file.fileno())
                if stat.S_ISREG(status.st_mode) and status.st_size == size:
                    data = bytearray(size)
                    if file.readinto(data) == size:
                        return data
        except FileNotFoundError:
            return None
        except OSError:
            pass
        self.remove(name)
        return None

    def write(self, name: str, parts: Iterable[Bytes], used_ns: int) -> None:
        """Write a file beside its place and rename it. ``used_ns``: when it was used last. Raises OSError."""
        temporary = self.folder / f".{name}.{secrets.token_hex(4)}.partial"
        try:
            with open(temporary, "xb", opener=_open_private) as file:
                file.writelines(parts)
            os.utime(temporary, ns=(used_ns, used_ns))
            os.replace(temporary, self._path(name))
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise

    def touch(self, name: str, used_ns: int) -> bool:
        """Note when a file was used last. False when there is none."""
        try:
            os.utime(self._path(name), ns=(used_ns, used_ns))
        except OSError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove a file, if it is there and the system lets us."""
        with suppress(OSError):
            self._path(name).unlink()

    def make_room(self, wanted: int) -> None:
        """Remove what was used least recently until ``wanted`` more bytes keep the bound. Raises OSError.

        Files of other names are neither counted nor touched.
        """
        files = []
        for entry in os.scandir(self.folder):
            if _FILE.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # another process was faster
                    status = entry.stat(follow_symlinks=False)
                    files.append((status.st_mtime_ns, status.st_size, entry))
        excess = sum(size for _, size, _ in files) + wanted - self.max_bytes
        abandoned = time.time_ns() - int(_ABANDONED * 1e9)
        for used, size, entry in sorted(files, key=lambda file: file[0]):
            partial = entry.name.endswith(".partial")
            if used < abandoned if partial else excess > 0:
                with suppress(OSError):
                    os.unlink(entry.path)
                    excess -= size

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.kv"


def _check_private(folder: Path) -> None:
    if not hasattr(os, "getuid"):
        return  # Windows gives a user's folders to that user
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise RequestError(f"cache_dir {folder} belongs to another user; choose a folder of your own")
    if status.st_mode & 0o077:
        raise RequestError(
            f"cache_dir {folder} can be read by other users, and prompts are private; "
            f"choose a folder that does not exist yet, or run: chmod 700 {folder}"
        )


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _open_plain(path: str, flags: int) -> int:
    """Follows no link, and does not wait for the other end of a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
