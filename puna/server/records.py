"""What the server keeps for its users: JSON objects in private files, each of one tenant, written all or nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from puna.errors import CapacityError, NotFoundError, PunaError
from puna.store.disk import sync_folder

Record = dict[str, Any]
ABANDONED = 86400.0  # seconds after which something half written belongs to nobody any more
_log = logging.getLogger(__name__)
_ID = re.compile(r"[a-z]+[-_][0-9a-f]{32}")


def new_id(prefix: str) -> str:
    """An id that nobody guesses; those made later sort later. ``prefix`` ends in - or _."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(8)}"


@contextmanager
def state_errors(place: Path) -> Iterator[None]:
    """Turn an OSError of the disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"the server's disk is full: {place} cannot be written; free some space", 60.0
            ) from error
        raise PunaError(f"{error.filename or place}: {error.strerror or error}; check the server's store") from error


def private_folder(path: Path) -> Path:
    """A folder that only the server's user may read, made if need be."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def private_file(path: Path) -> int:
    """The descriptor of a new file that only the server's user may read."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)


def write_whole(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a private file all or nothing; ``durable``: it is on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with os.fdopen(private_file(temporary), "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def abandoned(path: Path) -> bool:
    """Whether nobody has touched a file or folder for so long that its maker must be gone."""
    return time.time() - path.stat().st_mtime > ABANDONED


class Records:
    """The objects of one kind, a file each, by their ids. ``kind`` names them in errors.

    Safe under several processes; the last to write wins. Raises NotFoundError, CapacityError (a full disk), PunaError.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self._kind = kind

    def write(self, tenant: str, record: Record, *, durable: bool = True) -> None:
        """Keep a record under its ``id``, in place of what was there."""
        data = json.dumps({"tenant": tenant, "record": record}).encode()
        with state_errors(self.folder):
            private_folder(self.folder)
            write_whole(self._path(record["id"]), data, durable=durable)

    def read(self, tenant: str, record_id: str) -> Record:
        """The record of that id, if it is the tenant's."""
        found = self._read(self._path(record_id))
        if found is None or found[0] != tenant:
            raise self.missing(record_id)
        return found[1]

    def delete(self, tenant: str, record_id: str) -> None:
        """Forget a record of the tenant's."""
        self.read(tenant, record_id)
        with state_errors(self.folder):
            self._path(record_id).unlink(missing_ok=True)
            sync_folder(self.folder)

    def of(self, tenant: str) -> list[Record]:
        """All of a tenant's records, the newest first."""
        return [record for owner, record in self.all() if owner == tenant]

    def all(self) -> list[tuple[str, Record]]:
        """Every record with its tenant, the newest first. A damaged one is told of in the log and left out."""
        found = []
        for path in self.folder.glob("*.json"):
            try:
                entry = self._read(path)
            except PunaError as error:
                _log.error("%s", error)
                continue
            if entry is not None:
                found.append(entry)
        return sorted(found, key=lambda entry: str(entry[1]["id"]), reverse=True)

    def clean(self) -> None:
        """Remove what killed servers left half written."""
        with state_errors(self.folder):
            for path in self.folder.glob(".*.partial"):
                if abandoned(path):
                    path.unlink(missing_ok=True)

    def missing(self, record_id: str) -> NotFoundError:
        return NotFoundError(f"there is no {self._kind} {record_id!r}")

    def _path(self, record_id: str) -> Path:
        if not _ID.fullmatch(record_id):
            raise self.missing(record_id)
        return self.folder / f"{record_id}.json"

    def _read(self, path: Path) -> tuple[str, Record] | None:
        with state_errors(path):
            try:
                raw = json.loads(path.read_bytes())
                return raw["tenant"], raw["record"]
            except FileNotFoundError:
                return None
            except (ValueError, KeyError, TypeError):
                raise PunaError(f"{path} is damaged; delete it") from None


def page(records: list[Record], limit: int, after: str | None, missing: str) -> dict[str, Any]:
    """A list of OpenAI's API: at most ``limit`` records, those that follow ``after``. Raises NotFoundError."""
    if after is not None:
        ids = [record["id"] for record in records]
        if after not in ids:
            raise NotFoundError(f"after: there is no {missing} {after!r}")
        records = records[ids.index(after) + 1 :]
    shown = records[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(records) > limit,
    }
