"""LoRA adapters that models may be asked for with: ``base:adapter``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from puna.errors import RequestError, StoreError
from puna.store import Manifest, Store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter by its ``name``, of the stored model ``base``, in a PEFT folder or a GGUF file at ``path``."""

    base: str
    name: str
    path: Path

    @property
    def model(self) -> str:
        """What requests call the two."""
        return f"{self.base.removesuffix(':latest')}:{self.name}"


class Adapters:
    """The adapters that the server was told of, and those that stored models come with.

    Paths are only taken below ``folder``: whoever may send requests must not make the server read any file.
    """

    def __init__(self, store: Store, folder: Path | None) -> None:
        self._store = store
        self._folder = None if folder is None else folder.expanduser().resolve()
        self._added: dict[tuple[str, str], ServedAdapter] = {}

    def added(self) -> list[ServedAdapter]:
        """Those that the server was told of, by name."""
        return sorted(self._added.values(), key=lambda adapter: adapter.model)

    def resolve(self, text: str) -> tuple[Manifest, ServedAdapter | None]:
        """The stored model and the adapter that a model's name means.

        A stored model that has one adapter is meant with it. Raises StoreError when there is no such model or adapter,
        RequestError when a model has several and none is named.
        """
        base, _, name = text.rpartition(":")
        found = self._added_as(base, name)
        if found is not None:
            return self._store.find(base), found
        try:
            manifest = self._store.find(text)
        except StoreError:
            stored = self._stored_as(base, name)
            if stored is None:
                raise
            return stored
        if not manifest.adapters:
            return manifest, None
        if len(manifest.adapters) > 1:
            names = ", ".join(f"{text}:{adapter.name}" for adapter in manifest.adapters)
            raise RequestError(f"{text} has several adapters, of which an answer can have one; ask for one of {names}")
        return manifest, self._stored(manifest, manifest.adapters[0].name)

    def make(self, base: str, name: str, path: str) -> ServedAdapter:
        """An adapter to load. Raises RequestError for a name or path that is not allowed, StoreError for the base."""
        if not _NAME.fullmatch(name):
            raise RequestError(f"an adapter's name must be letters, digits, '.', '_' and '-', found {name[:100]!r}")
        if self._folder is None:
            raise RequestError("this server takes no adapters' paths; start it with --adapter-dir FOLDER")
        try:
            place = (self._folder / path).resolve()
        except (OSError, ValueError, RuntimeError):
            place = Path("/")
        if not place.is_relative_to(self._folder):
            raise RequestError(f"an adapter's path must be within the server's --adapter-dir, found {path[:200]!r}")
        key = str(self._store.locate(base))
        adapter = ServedAdapter(key, name, place)
        try:
            self.resolve(adapter.model)
        except StoreError:
            return adapter
        raise RequestError(
            f"there is a model {adapter.model} already; unload that adapter first, or choose another name"
        )

    def add(self, adapter: ServedAdapter) -> None:
        """Raises RequestError when one of that name was added meanwhile."""
        if (adapter.base, adapter.name) in self._added:
            raise RequestError(f"there is an adapter {adapter.model} already")
        self._added[adapter.base, adapter.name] = adapter

    def remove(self, adapter: ServedAdapter) -> None:
        self._added.pop((adapter.base, adapter.name), None)

    def find(self, text: str) -> ServedAdapter:
        """One that was added, by its own name or by ``base:adapter``. Raises RequestError."""
        base, _, name = text.rpartition(":")
        named = [adapter for adapter in self.added() if adapter.name == name]
        if base:
            named = [adapter for adapter in named if adapter.base == str(self._store.locate(base))]
        if len(named) == 1:
            return named[0]
        known = ", ".join(adapter.model for adapter in self.added()) or "none is"
        raise RequestError(f"no adapter is meant by {text[:200]!r}, or several are; loaded: {known}")

    def _added_as(self, base: str, name: str) -> ServedAdapter | None:
        if all(name != known for _, known in self._added):
            return None
        try:
            return self._added.get((str(self._store.locate(base)), name))
        except StoreError:
            return None

    def _stored_as(self, base: str, name: str) -> tuple[Manifest, ServedAdapter] | None:
        try:
            manifest = self._store.find(base)
        except StoreError:
            return None
        if all(adapter.name != name for adapter in manifest.adapters):
            return None
        return manifest, self._stored(manifest, name)

    def _stored(self, manifest: Manifest, name: str) -> ServedAdapter:
        return ServedAdapter(str(manifest.model_name), name, self._store.adapter_paths(manifest)[name])
