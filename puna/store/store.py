"""The store: which models are here, under which names, and the changes that several processes may make at once."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import platformdirs

from puna.errors import StoreError
from puna.store.blobs import Blobs
from puna.store.disk import digest_file, disk_errors, link_or_copy, sync_folder, write_text
from puna.store.lock import file_lock
from puna.store.manifest import Manifest, StoredAdapter, StoredFile
from puna.store.names import ModelName, catalog_entry
from puna.store.packs import Packs
from puna.store.progress import Meter, Progress, Silent

_ATTEMPTS = 20
_DIGEST = re.compile(rb"[0-9a-f]{64}")


class MissingBlobs(StoreError):
    """A manifest was offered whose files are not here: they were never staged, or were collected meanwhile."""


@dataclass(frozen=True)
class Damage:
    """A file of a model that is not what its manifest says."""

    model: ModelName
    file: str
    problem: str


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def default_home() -> Path:
    """``PUNA_HOME``, or the user's data folder."""
    chosen = os.environ.get("PUNA_HOME")
    return Path(chosen).expanduser().absolute() if chosen else Path(platformdirs.user_data_dir("puna", appauthor=False))


class Store:
    """Models on this machine: ``blobs/``, ``manifests/``, ``views/`` (a folder per model with its files' own names)
    and ``packed/``.

    Reading takes no lock. ``notify`` hears one-line messages: waits, and damaged manifests that were passed over.
    Every method raises StoreError when the disk is full, forbids writing, or holds a damaged manifest.
    """

    def __init__(self, home: Path | None = None, notify: Callable[[str], None] = _say) -> None:
        self.home = (home or default_home()).absolute()
        self.notify = notify
        self.blobs = Blobs(self.home)
        self.packs = Packs(self.home)
        self._manifests = self.home / "manifests"
        self._views = self.home / "views"

    def models(self) -> list[Manifest]:
        """Every stored model, by name. A damaged manifest is told to ``notify`` and left out."""
        found = []
        with disk_errors(self.home):
            for name in self._names():
                try:
                    manifest = self.read(name)
                except StoreError as error:
                    self.notify(str(error))
                    continue
                if manifest is not None:
                    found.append(manifest)
        return found

    def read(self, name: ModelName) -> Manifest | None:
        """The manifest under exactly that name, or None. Raises StoreError when it is damaged."""
        path = self._manifests / name.manifest
        with disk_errors(path):
            try:
                text = path.read_text(encoding="utf-8")
            except FileNotFoundError:
                return None
            except UnicodeDecodeError:
                text = ""
        manifest = Manifest.from_json(text, str(path))
        if manifest.model_name != name:
            raise StoreError(f"the manifest {path} is damaged: it is that of {manifest.model_name}")
        return manifest

    def locate(self, text: str) -> ModelName:
        """The stored name that ``text`` means: itself, or the catalog's for it. Raises StoreError saying what to do."""
        name = ModelName.parse(text)
        entry = catalog_entry(text)
        candidates = [name] if entry is None else [name, ModelName(entry.name)]
        for candidate in candidates:
            if (self._manifests / candidate.manifest).is_file():
                return candidate
        if entry is not None or "/" in name.name:
            raise StoreError(f"{text} is not in the model store; `puna pull {text}` fetches it")
        known = {n.name if n.tag == "latest" else str(n) for n in self._names()}
        near = difflib.get_close_matches(text.lower(), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`puna list` shows what is"
        raise StoreError(f"no model {text} is in the store at {self.home}; {hint}")

    def find(self, text: str) -> Manifest:
        """The manifest of a stored model by any of its names. Raises StoreError when it is not stored."""
        name = self.locate(text)
        manifest = self.read(name)
        if manifest is None:
            raise StoreError(f"{name} was removed just now; `puna pull {name}` fetches it again")
        return manifest

    def path_of(self, manifest: Manifest) -> Path:
        """The .gguf file (the first of a split one) or checkpoint folder to open. Raises StoreError for lost files."""
        return self._path_of(manifest, manifest)

    def adapter_paths(self, manifest: Manifest) -> dict[str, Path]:
        """By name, the .gguf file or folder of each of a model's adapters. Raises StoreError for lost files."""
        return {adapter.name: self._path_of(manifest, adapter) for adapter in manifest.adapters}

    def _path_of(self, manifest: Manifest, part: Manifest | StoredAdapter) -> Path:
        for file in part.files:
            self._check_blob(manifest, file)
        view = self._views / part.content_digest
        if not _view_is_whole(view, part):
            with self._locked(), disk_errors(view):
                self._build_view(part)
        is_gguf = all(file.file.endswith(".gguf") for file in part.files)
        return view / min(file.file for file in part.files) if is_gguf else view

    def add(self, make: Callable[[], Manifest], *, replace: bool = True) -> Manifest:
        """Commit what ``make`` stages and describes.

        It is called again when another process, between its look and the commit, removed the last model that had one of
        the files. Raises what ``make`` and ``commit`` raise.
        """
        for _ in range(_ATTEMPTS - 1):
            manifest = make()
            try:
                self.commit(manifest, replace=replace)
            except MissingBlobs:
                continue
            return manifest
        manifest = make()
        self.commit(manifest, replace=replace)
        return manifest

    def commit(self, manifest: Manifest, *, replace: bool = True) -> None:
        """Store a manifest whose files are staged or present, all or nothing.

        Raises MissingBlobs when they are not, StoreError when the name is taken by other files and ``replace`` is
        false.
        """
        with self._locked(), disk_errors(self.home):
            path = self._manifests / manifest.model_name.manifest
            if not replace:
                self.check_free(manifest.model_name, manifest)
            missing = [file.file for file in manifest.all_files if not self.blobs.publish(file)]
            if missing:
                raise MissingBlobs(f"{', '.join(missing)} of {manifest.model_name} must be fetched again")
            replaces = path.exists()
            for part in manifest.parts:
                if not _view_is_whole(self._views / part.content_digest, part):
                    self._build_view(part)
            write_text(path, manifest.to_json())
            if replaces:
                self._collect()

    def check_free(self, name: ModelName, manifest: Manifest | None = None) -> None:
        """Raise StoreError when ``name`` is taken, unless by the same files as ``manifest``."""
        existing = self.read(name)
        if existing is not None and (manifest is None or existing.content_digest != manifest.content_digest):
            raise StoreError(f"{name} exists already; choose another name, or remove it first with `puna rm {name}`")

    def copy(self, source: str, target: str, *, replace: bool = False) -> Manifest:
        """Give a model a second name; no bytes are copied."""
        name = ModelName.parse(target)
        manifest = _renamed(self.find(source), name)
        self.commit(manifest, replace=replace)
        return manifest

    def remove(self, text: str) -> int:
        """Remove a model and every blob that no other one needs; return the bytes freed."""
        with self._locked(), disk_errors(self.home):
            path = self._manifests / self.locate(text).manifest
            path.unlink()
            sync_folder(path.parent)
            self._remove_empty_folders(path.parent)
            return self._collect()

    def collect_garbage(self) -> int:
        """Delete what no manifest names, such as the leftovers of a killed process; return the bytes freed."""
        with self._locked(), disk_errors(self.home):
            return self._collect()

    def verify(self, text: str | None = None, progress: Progress | None = None) -> list[Damage]:
        """Compare the files of one model, or of all, with their digests."""
        found = []
        problems: dict[StoredFile, str] = {}
        for manifest in self.models() if text is None else [self.find(text)]:
            for file in manifest.all_files:
                with disk_errors(self.home):
                    if file not in problems:
                        problems[file] = self._problem(file, progress or Silent())
                if problems[file]:
                    found.append(Damage(manifest.model_name, file.file, problems[file]))
        return found

    def _names(self) -> list[ModelName]:
        paths = [path.relative_to(self._manifests) for path in self._manifests.rglob("*.json")]
        names = (ModelName(path.parent.as_posix(), path.stem) for path in paths)
        return sorted(names)

    def _check_blob(self, manifest: Manifest, file: StoredFile) -> None:
        path = self.blobs.path(file.sha256)
        with disk_errors(path):
            size = path.stat().st_size if path.exists() else None
        if size != file.size:
            found = "is lost" if size is None else f"has {size} bytes instead of {file.size}"
            raise StoreError(
                f"{file.file} of {manifest.model_name} {found}; remove the model with `puna rm {manifest.model_name}` "
                "and pull or import it again"
            )

    def _problem(self, file: StoredFile, progress: Progress) -> str:
        path = self.blobs.path(file.sha256)
        if not path.exists():
            return "lost"
        found = digest_file(path, Meter(progress, file.file, file.size))
        return "" if found == file.sha256 else f"sha256 is {found} instead of {file.sha256}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        def on_wait() -> None:
            self.notify("waiting for another Puna process that is changing the model store")

        with disk_errors(self.home), file_lock(self.home / "lock", on_wait):
            yield

    def _build_view(self, part: Manifest | StoredAdapter) -> None:
        view = self._views / part.content_digest
        fresh = view.with_name(f".{view.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for file in part.files:
            link_or_copy(self.blobs.path(file.sha256), fresh / file.file)
        if view.exists():
            shutil.rmtree(view)
        os.replace(fresh, view)

    def _collect(self) -> int:
        referenced: set[str] = set()
        views: set[str] = set()
        for name in self._names():
            # The text, not the parsed manifest: what a damaged or newer one names is kept too.
            raw = (self._manifests / name.manifest).read_bytes()
            referenced |= {digest.decode() for digest in _DIGEST.findall(raw)}
            try:
                manifest = Manifest.from_json(raw.decode("utf-8", "replace"), str(name))
                views |= {part.content_digest for part in manifest.parts}
            except StoreError as error:
                self.notify(str(error))
        for view in self._views.glob("*"):
            if view.name not in views:
                shutil.rmtree(view)
        for leftover in self._manifests.rglob(".*.new"):
            leftover.unlink()
        self.blobs.collect_partial()
        return self.packs.collect(views) + self.blobs.collect(referenced)

    def _remove_empty_folders(self, folder: Path) -> None:
        while folder != self._manifests and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent


def _renamed(manifest: Manifest, name: ModelName) -> Manifest:
    return replace(manifest, name=name.name, tag=name.tag)


def _view_is_whole(view: Path, part: Manifest | StoredAdapter) -> bool:
    try:
        return all((view / file.file).stat().st_size == file.size for file in part.files)
    except OSError:
        return False
