"""Taking a model that lies on this machine into the store, without copying it where the disk allows."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puna.errors import StoreError
from puna.store.disk import CHUNK, check_space, digest_file, disk_errors
from puna.store.manifest import Lineage, Manifest, StoredFile, is_file_name
from puna.store.names import ModelName, name_part_from
from puna.store.progress import Meter, Progress, Silent
from puna.store.selection import check_parts, companions_of, select_files, whole_name
from puna.store.store import Store


def import_file(
    path: str | Path,
    name: str | None = None,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
    copy: bool = False,
    replace: bool = False,
    licence: str | None = None,
    lineage: Lineage | None = None,
    report: Mapping[str, Any] | None = None,
) -> Manifest:
    """Store a .gguf file (with its other parts), a .safetensors file (with its configuration) or a checkpoint folder.

    On the same disk each file becomes a hard link: no bytes are copied, and changing the original in place damages
    the model (``verify`` tells). ``copy`` copies in any case. ``name`` defaults to the file's. ``report`` is kept with
    it. Raises StoreError when
    there is no model, when the name is taken and ``replace`` is false, or when a file changes while it is read.
    """
    store, progress = store or Store(), progress or Silent()
    path = Path(path).expanduser().absolute()
    model_name = ModelName.parse(name) if name else _name_of(path)
    with disk_errors(path):
        folder, files = files_of_model(path)
    existing = store.read(model_name)
    if existing is not None and not replace and {f.file for f in existing.files} != set(files):
        store.check_free(model_name)  # commit checks again, but only after the long work

    def make() -> Manifest:
        with disk_errors(path):
            stored = tuple(take_file(store, folder / file, progress, copy) for file in files)
        made = Manifest(
            model_name.name,
            model_name.tag,
            stored,
            licence=licence,
            source=str(path),
            lineage=lineage,
            report=report,
        )
        if existing is None or existing.content_digest != made.content_digest:
            return made
        # Imported again: keep the template, system prompt and parameters that it was given since.
        return dataclasses.replace(
            existing,
            source=made.source,
            licence=licence or existing.licence,
            lineage=lineage or existing.lineage,
            report=report or existing.report,
        )

    return store.add(make, replace=replace)


def _name_of(path: Path) -> ModelName:
    return ModelName(name_part_from(Path(whole_name(path.name)).stem if path.is_file() else path.name))


def files_of_model(path: Path) -> tuple[Path, list[str]]:
    """The folder, and the names in it that make up the model at ``path``."""
    if not path.exists():
        raise StoreError(f"{path} does not exist; give a .gguf file or a checkpoint folder")
    folder = path if path.is_dir() else path.parent
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    if path.is_dir():
        files = select_files(names, None, str(path))
    else:
        if path.suffix.lower() not in (".gguf", ".safetensors"):
            raise StoreError(f"{path} is neither a .gguf nor a .safetensors file; for other formats see `puna convert`")
        if not is_file_name(path.name):
            raise StoreError(
                f"the file name {path.name!r} has unusual characters; rename it to letters, digits, '.', '_', '-'"
            )
        files = companions_of(path.name, names)
    check_parts(files, str(folder))
    for file in files:
        if file.lower().endswith(".gguf"):
            check_magic(folder / file, str(folder / file))
    return folder, files


def check_magic(path: Path, what: str) -> None:
    """Raise StoreError when a file called .gguf does not begin like one: a saved error page, another format."""
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise StoreError(f"{what} is not a GGUF file: it begins with {start!r} instead of b'GGUF'")


def take_file(store: Store, original: Path, progress: Progress, copy: bool = False) -> StoredFile:
    """Stage one file, as a hard link where that can be. Raises StoreError when it changes meanwhile."""
    # The real file, not a link to it: Hugging Face's cache is a folder of links.
    source = original.resolve()
    before = source.stat()
    meter = Meter(progress, original.name, before.st_size)
    if copy or not _same_disk(source, store):
        stored = _copied(store, source, original.name, meter, progress)
    else:
        stored = StoredFile(original.name, digest_file(source, meter), before.st_size)
        if not store.blobs.present(stored) and not _linked(store, source, stored):
            stored = _copied(store, source, original.name, meter, progress)
    after = source.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        store.blobs.staged(stored.sha256).unlink(missing_ok=True)
        raise StoreError(f"{original} changed while it was read; import it when it is finished")
    return stored


def _same_disk(source: Path, store: Store) -> bool:
    store.blobs.partial.mkdir(parents=True, exist_ok=True)
    return source.stat().st_dev == store.blobs.partial.stat().st_dev


def _linked(store: Store, source: Path, file: StoredFile) -> bool:
    try:
        os.link(source, store.blobs.staged(file.sha256))
    except FileExistsError:
        store.blobs.staged(file.sha256).unlink(missing_ok=True)  # of another size, or present() had said so
        return _linked(store, source, file)
    except OSError:
        return False  # no hard links on this file system, or not to another user's files
    return True


def _copied(store: Store, source: Path, name: str, meter: Meter, progress: Progress) -> StoredFile:
    size = source.stat().st_size
    key = "copy-" + hashlib.sha256(str(source).encode()).hexdigest()
    digest = hashlib.sha256()

    def on_wait() -> None:
        progress.status(f"waiting for another Puna process that is copying {name}")

    with store.blobs.receiving(key, on_wait) as part:
        check_space(store.blobs.partial, size, name)
        done = 0
        with source.open("rb") as reader, part.open("wb") as writer:
            while chunk := reader.read(CHUNK):
                writer.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                meter.update(done)
        store.blobs.stage(part, digest.hexdigest())
    return StoredFile(name, digest.hexdigest(), done)
