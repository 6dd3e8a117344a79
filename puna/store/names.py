"""Model names: ``name[:tag]``, where a name may have an owner before a slash."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from puna import catalog
from puna.catalog import CatalogEntry
from puna.errors import StoreError

DEFAULT_TAG = "latest"
_PART = re.compile(r"[a-z0-9_](?:[a-z0-9._-]{0,94}[a-z0-9_])?")
_MAX_PARTS = 4
_HUGGING_FACE = ("hf.co/", "huggingface.co/")


@dataclass(frozen=True, order=True)
class ModelName:
    """A checked name and tag, in lower case: the same model on file systems that do and do not tell cases apart."""

    name: str
    tag: str = DEFAULT_TAG

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Read ``name``, ``name:tag``, ``owner/name:tag`` or ``hf.co/owner/name:tag``. Raises StoreError."""
        lowered = text.strip().lower()
        for prefix in _HUGGING_FACE:
            lowered = lowered.removeprefix(prefix)
        name, colon, tag = lowered.partition(":")
        parts = name.split("/")
        good = len(parts) <= _MAX_PARTS and all(map(_is_part, parts)) and (not colon or _is_part(tag))
        if not good:
            raise StoreError(
                f"{text!r} is not a model name; expected name[:tag] of letters, digits, '.', '_' and '-', "
                "with '/' between an owner and a name"
            )
        return cls(name, tag.removesuffix(".gguf") or DEFAULT_TAG)

    def __str__(self) -> str:
        return f"{self.name}:{self.tag}"

    @property
    def manifest(self) -> PurePosixPath:
        """Where the manifest lies, below the folder of manifests."""
        return PurePosixPath(self.name, f"{self.tag}.json")


def name_part_from(text: str) -> str:
    """A name or tag made from any text, such as a file's stem. Raises StoreError when nothing usable is left."""
    part = re.sub(r"[^a-z0-9._]+", "-", text.lower())[:96].strip(".-")
    if not _is_part(part):
        raise StoreError(f"cannot make a model name from {text!r}; give one")
    return part


def _is_part(part: str) -> bool:
    # A folder ending in .json would meet the manifest of a tag.
    return _PART.fullmatch(part) is not None and not part.endswith(".json")


def catalog_entry(text: str) -> CatalogEntry | None:
    """The catalog's entry for a name, if it has one; with an owner, only for the very repository of an entry."""
    try:
        entry = catalog.get(text)
        repository = ModelName.parse(text).name if "/" in text else None
    except StoreError:
        return None
    repositories = {source.location.lower() for source in entry.sources if source.kind == "huggingface"}
    return entry if repository is None or repository in repositories else None
