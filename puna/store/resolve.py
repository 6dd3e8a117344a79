"""From what a user calls a model to the file or folder to open."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from puna.errors import StoreError
from puna.store.manifest import Manifest
from puna.store.packs import packed_beside, path_identity
from puna.store.store import Store

MODEL_SUFFIXES = (".gguf", ".safetensors")


@dataclass(frozen=True)
class ResolvedModel:
    """``path`` is what ``open_checkpoint`` takes; ``manifest`` is None for a file or folder outside the store.

    ``packed`` is where the packed file of the model lies, or would. ``adapters`` are the stored model's own, by name.
    """

    path: Path
    manifest: Manifest | None
    packed: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """What a packed file must have been made from. Raises OSError."""
        return path_identity(self.path) if self.manifest is None else self.manifest.content_digest

    def adapter_path(self, name_or_path: Path) -> Path:
        """Where an adapter lies that the stored model has by this name; the path itself where one is meant."""
        return name_or_path if name_or_path.exists() else self.adapters.get(str(name_or_path), name_or_path)


def resolve(name_or_path: str | os.PathLike[str], store: Store | None = None) -> ResolvedModel:
    """Find a model by name, or by the path of a .gguf file or checkpoint folder.

    An existing path wins when it has a separator or a weights file's suffix; everything else is a name in the store, or
    else a folder here. Raises StoreError when there is neither, saying how to get the model or which names are near.
    """
    path = existing_path(name_or_path)
    if path is not None:
        return _outside(path)
    text = os.fspath(name_or_path)
    store = store or Store()
    try:
        manifest = store.find(text)
    except StoreError:
        if os.path.exists(text):
            return _outside(Path(text))
        raise
    return resolve_stored(manifest, store)


def resolve_stored(manifest: Manifest, store: Store) -> ResolvedModel:
    """Where a stored model's files are. Raises StoreError for lost ones."""
    packed = store.packs.path(manifest.content_digest)
    return ResolvedModel(store.path_of(manifest), manifest, packed, store.adapter_paths(manifest))


def _outside(path: Path) -> ResolvedModel:
    return ResolvedModel(path, None, packed_beside(path))


def existing_path(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The path that is meant, or None for a name. Raises StoreError for what can only be a path, and does not exist."""
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    only_a_path = not isinstance(name_or_path, str) or text.startswith((".", "~")) or path.is_absolute()
    suffixed = path.suffix.lower() in MODEL_SUFFIXES and ":" not in text  # owner/name:file.gguf is a name
    if only_a_path or suffixed or "/" in text or os.sep in text:
        if path.exists():
            return path
        if only_a_path or suffixed:
            raise StoreError(f"{path} does not exist; give a .gguf file, a checkpoint folder, or a model's name")
    return None
