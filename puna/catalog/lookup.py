"""Finding an entry by name."""

from __future__ import annotations

import difflib
from functools import cache

from puna.catalog.entry import CatalogEntry
from puna.catalog.later_models import later_entries
from puna.catalog.text_models import text_entries
from puna.errors import StoreError

DEFAULT = "smollm2-135m-instruct"
_TUNED = ("instruct", "chat")
_UNTUNED_TAGS = ("-text", "-code", "-base")


@cache
def entries() -> tuple[CatalogEntry, ...]:
    """Every entry, by release."""
    return (*text_entries(), *later_entries())


def get(name: str) -> CatalogEntry:
    """The entry of that name. Raises StoreError with the nearest names when there is none.

    Names are compared by their letters and digits: ``Llama-3.1-8B``, ``llama3.1-8b`` and the repository id
    ``meta-llama/Llama-3.1-8B`` are one. As in ollama, ``family:size`` means the tuned model where there is one
    (``-text`` or ``-code`` asks for the base model), and a family alone means its smallest tuned model. The suffix of a
    release without a base model may be left out: ``llama-3.3-70b``.
    """
    index = _index()
    name = name.removesuffix(":latest")
    wanted = _key(name)
    base = next((name.removesuffix(tag) for tag in _UNTUNED_TAGS if name.endswith(tag)), None) if ":" in name else None
    if base is not None:
        wanted = _key(base)
    elif ":" in name or wanted not in index:
        wanted = next((wanted + suffix for suffix in _TUNED if wanted + suffix in index), wanted)
    if wanted in index:
        return index[wanted]
    known = [entry.name for entry in entries()]
    near = difflib.get_close_matches(name.lower().replace(":", "-"), known, n=4, cutoff=0.5)
    hint = f"the nearest are {', '.join(near)}" if near else f"for example {DEFAULT} or llama-3.2-1b-instruct"
    raise StoreError(f"no model named {name!r} is in the catalog; {hint}")


@cache
def _index() -> dict[str, CatalogEntry]:
    index: dict[str, CatalogEntry] = {}
    by_size = sorted(entries(), key=lambda entry: (not _is_tuned(entry), entry.parameters))
    for entry in by_size:
        index.setdefault(_key(entry.family), entry)
        for source in entry.sources:
            if source.kind == "huggingface":
                index[_key(source.location)] = entry
                index[_key(source.location.rpartition("/")[2])] = entry
    index["llama33b"] = index["llama30b"]  # the paper's name of the size that the files call 30B
    return index | {_key(entry.name): entry for entry in by_size}


def _is_tuned(entry: CatalogEntry) -> bool:
    return entry.name.endswith(_TUNED)


def _key(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
