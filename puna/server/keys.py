"""The keys that clients send: who they are, what they may do and how much of it.

A key is 32 random bytes, so its SHA-256 is all that is stored: nobody finds it by guessing, and the slow hashes that
protect passwords would only make every request slow.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any, Literal, get_args

from puna.errors import StoreError
from puna.store import Store
from puna.store.disk import disk_errors, sync_folder
from puna.store.lock import file_lock

KeyScope = Literal["inference", "admin"]
_log = logging.getLogger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_tokens")


@dataclass(frozen=True)
class Key:
    """One key. ``digest`` is the hexadecimal SHA-256 of its secret; a limit of None is none.

    ``max_tokens`` bounds the answer of one request, ``tokens_per_minute`` counts prompts and answers. Raises StoreError
    naming the field.
    """

    name: str
    scope: KeyScope
    digest: str
    created: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.scope not in get_args(KeyScope):
            raise StoreError(f"the scope of the key {self.name} must be inference or admin, found {self.scope!r}")
        if not (isinstance(self.digest, str) and re.fullmatch(r"[0-9a-f]{64}", self.digest)):
            raise StoreError(f"the digest of the key {self.name} must be 64 hexadecimal digits, found {self.digest!r}")
        for field in _LIMITS:
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise StoreError(f"{field} of the key {self.name} must be a whole number from 1, found {value!r}")


class KeyFile:
    """``server/keys.json`` in the store's home, private to its owner. Several processes may change it at once."""

    def __init__(self, store: Store) -> None:
        self.path = store.home / "server" / "keys.json"

    def read(self) -> list[Key]:
        """The keys by name; none when there is no file. Raises StoreError when it is damaged or can't be read."""
        with disk_errors(self.path):
            try:
                raw = self.path.read_bytes()
            except FileNotFoundError:
                return []
        try:
            keys = [Key(**entry) for entry in json.loads(raw)["keys"]]
            for key in keys:
                _check_name(key.name)
        except (ValueError, KeyError, TypeError, StoreError, RecursionError) as error:
            detail = f": {error}" if isinstance(error, StoreError) else ""
            raise StoreError(f"{self.path} is damaged{detail}; remove it and add the keys again") from None
        return sorted(keys, key=lambda key: key.name)

    def add(self, name: str, scope: KeyScope = "inference", **limits: int | None) -> str:
        """Make a key and give its secret, which is kept nowhere. Raises StoreError for a name that is taken or bad."""
        _check_name(name)
        secret = f"puna-{secrets.token_urlsafe(32)}"
        created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        with self._changing() as keys:
            if any(key.name == name for key in keys):
                raise StoreError(
                    f"there is a key {name} already; choose another name, or remove it: puna keys rm {name}"
                )
            keys.append(Key(name, scope, digest_of(secret.encode()), created, **limits))
        return secret

    def remove(self, name: str) -> None:
        """Forget a key. Raises StoreError when there is none of that name."""
        with self._changing() as keys:
            kept = [key for key in keys if key.name != name]
            if len(kept) == len(keys):
                raise StoreError(f"there is no key {name}; `puna keys list` shows what there is")
            keys[:] = kept

    def version(self) -> tuple[int, ...] | None:
        """What is different after every change of the file; None when there is none. Raises StoreError."""
        with disk_errors(self.path):
            try:
                status = self.path.stat()
            except FileNotFoundError:
                return None
        return (status.st_mtime_ns, status.st_size, status.st_ino)

    @contextmanager
    def _changing(self) -> Iterator[list[Key]]:
        folder = self.path.parent
        with disk_errors(self.path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with file_lock(folder / "keys.lock", lambda: None):
                keys = self.read()
                yield keys
                self._write(keys)

    def _write(self, keys: Sequence[Key]) -> None:
        temporary = self.path.with_name(".keys.json.new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"version": 1, "keys": [asdict(key) for key in keys]}, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)
        sync_folder(self.path.parent)


class Keys:
    """All keys that a server takes: those it was started with, and those of its file as it is now.

    Once there was a key, one is required until the server ends: removing the last one must not open it to everybody.
    """

    def __init__(self, secrets: Sequence[str] = (), file: KeyFile | None = None) -> None:
        """Keys it is started with may do everything, and are named after their place. Raises what reading raises."""
        self._started_with = [Key(f"api-key:{i}", "admin", digest_of(s.encode())) for i, s in enumerate(secrets, 1)]
        self._file = file
        self._version = None if file is None else file.version()
        self._keys = [*self._started_with, *([] if file is None else file.read())]
        self._seen = bool(self._keys)

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        self._refresh()
        return self._seen

    def find(self, secret: bytes) -> Key | None:
        """The key of that secret. The time it takes tells nothing about any key."""
        self._refresh()
        digest = digest_of(secret)
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def named(self, name: str) -> Key | None:
        """The key of that name, if there is one now."""
        return next((key for key in self._keys if key.name == name), None)

    def _refresh(self) -> None:
        if self._file is None:
            return
        try:
            version = self._file.version()
            if version == self._version:
                return
            self._version = version
            self._keys = [*self._started_with, *self._file.read()]
        except StoreError as error:
            _log.warning("the keys stay as they were: %s", error)
            return
        self._seen = self._seen or bool(self._keys)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise StoreError(f"the name of a key must be letters, digits, '.', '_' and '-', at most 64, found {name!r}")


def digest_of(secret: bytes) -> str:
    """What is stored of a key's secret."""
    return hashlib.sha256(secret).hexdigest()


def describe(key: Key) -> dict[str, Any]:
    """What may be shown of a key."""
    return {"name": key.name, "scope": key.scope, **{f: getattr(key, f) for f in _LIMITS}, "created": key.created}
