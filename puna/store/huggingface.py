"""Models from Hugging Face's hub, or a server that speaks its API (``HF_ENDPOINT``)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from puna.errors import SourceError, StoreError
from puna.store.blobs import Blobs
from puna.store.fetch import fetch
from puna.store.http_download import Http, Remote
from puna.store.manifest import StoredFile
from puna.store.progress import Progress
from puna.store.selection import check_parts, select_files

_HASH = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[!-~]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fetch_repository(
    blobs: Blobs,
    http: Http,
    repository: str,
    choice: str | None,
    progress: Progress,
    token: str | None = None,
    revision: str = "main",
) -> tuple[tuple[StoredFile, ...], str]:
    """Stage the model's files of ``owner/name``; return them and the commit they are of.

    ``choice`` is a file or a quantization (see ``select_files``). ``token`` defaults to the user's own. Raises
    SourceError when the hub cannot be reached, refuses, or has no such model.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    token = token or user_token()
    if token is not None and not _TOKEN.fullmatch(token):
        raise SourceError("the access token must be one word of ASCII characters; check HF_TOKEN or --token")
    denied = (
        f"{repository} does not exist, is private, or asks you to accept its licence. Accept it at "
        f"{endpoint}/{repository}, then give your access token with HF_TOKEN or --token"
        + ("; the token that was sent is not enough" if token else "")
    )
    address = f"{endpoint}/api/models/{quote(repository)}/revision/{quote(revision, safe='')}?blobs=true"
    listing = http.get_json(Remote(address, repository, token=token, denied=denied), progress)
    commit, files = _read_listing(listing, address)
    try:
        chosen = select_files(files, choice, f"{endpoint}/{repository}")
        check_parts(chosen, f"{endpoint}/{repository}")
    except StoreError as error:
        raise SourceError(str(error)) from None
    stored = []
    for name in chosen:
        size, sha256 = files[name]
        url = f"{endpoint}/{quote(repository)}/resolve/{commit}/{quote(name)}"
        stored.append(fetch(blobs, http, Remote(url, name, size, sha256, token, denied), progress))
    return tuple(stored), commit


def user_token() -> str | None:
    """The access token of ``HF_TOKEN``, or of the file where Hugging Face's own tools keep it."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
        path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).expanduser()
        try:
            token = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
    return token or None


def _read_listing(listing: Any, address: str) -> tuple[str, dict[str, tuple[int | None, str | None]]]:
    """The commit, and size and sha256 (of large files only) by file name."""
    try:
        commit = listing["sha"]
        if not _COMMIT.fullmatch(commit):
            raise ValueError(commit)
        files: dict[str, tuple[int | None, str | None]] = {}
        for item in listing["siblings"]:
            large = item.get("lfs") or {}
            sha256 = large.get("sha256") or large.get("oid")
            size = large.get("size", item.get("size"))
            if sha256 is not None and not _HASH.fullmatch(sha256):
                raise ValueError(sha256)
            if size is not None and (not isinstance(size, int) or size < 0):
                raise ValueError(size)
            files[str(item["rfilename"])] = (size, sha256)
        return commit, files
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{address}: the answer is not the listing of a model: {error!r}") from None
