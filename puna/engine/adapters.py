"""The LoRA adapters that requests may name, and the model that knows all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from puna.engine.runner import RunnableModel
from puna.errors import RequestError
from puna.tensor import Adapter


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in memory.

    ``number`` is its place in the model (Batch.adapters) for as long as it is loaded, ``digest`` that of its content,
    ``rank`` the largest of its ranks, and ``nbytes`` the memory that it takes.
    """

    number: int
    digest: str
    rank: int
    nbytes: int
    uploaded: Any


class AdapterTable:
    """``model`` is the one to run: it changes with every ``load`` and ``unload``, between two steps."""

    def __init__(self, model: RunnableModel) -> None:
        self.model = model
        self.by_name: dict[str, LoadedAdapter] = {}
        self._bare = model

    def load(self, name: str, adapter: Adapter) -> None:
        """Raises RequestError when the name is taken."""
        if not name:
            raise RequestError("an adapter needs a name of at least one character")
        if name in self.by_name:
            raise RequestError(f"an adapter {name!r} is loaded already; unload it first, or choose another name")
        numbers = {loaded.number for loaded in self.by_name.values()}
        number = next(n for n in range(len(numbers) + 1) if n not in numbers)
        uploaded = self._bare.upload(adapter)
        self._set({**self.by_name, name: LoadedAdapter(number, adapter.digest, adapter.rank, adapter.nbytes, uploaded)})

    def unload(self, name: str) -> None:
        """Raises RequestError when there is none of that name."""
        self.find(name)
        self._set({other: loaded for other, loaded in self.by_name.items() if other != name})

    def find(self, name: str) -> LoadedAdapter:
        """Raises RequestError when there is none of that name."""
        if name not in self.by_name:
            known = ", ".join(self.by_name) or "none is"
            raise RequestError(f"no adapter {name!r} is loaded; loaded: {known}")
        return self.by_name[name]

    def _set(self, by_name: dict[str, LoadedAdapter]) -> None:
        by_number = {loaded.number: loaded.uploaded for loaded in by_name.values()}
        places = [by_number.get(number) for number in range(max(by_number, default=-1) + 1)]
        self.model = self._bare.adapted(places) if places else self._bare
        self.by_name = by_name
