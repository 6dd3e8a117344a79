"""Training of a stored model with an adapter: it goes on from the adapter's weights, over the model beneath."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from puna.checkpoint.lora import read_adapter
from puna.config import ModelConfig
from puna.errors import TrainingError
from puna.model.shapes import tensor_shapes
from puna.store import ResolvedModel
from puna.tensor import Adapter
from puna.train.module import LINEAR_LAYERS, is_target
from puna.train.recipe import Method, Recipe


def continued(recipe: Recipe, found: ResolvedModel, config: ModelConfig) -> tuple[Recipe, Adapter | None]:
    """The recipe with the rank, targets and alpha of the model's adapter, and the adapter; of a model without one the
    recipe as it is, and None.

    Raises CheckpointError for a damaged adapter, and TrainingError where training cannot go on from it.
    """
    if not found.adapters:
        return recipe, None
    if len(found.adapters) > 1:
        names = ", ".join(found.adapters)
        raise TrainingError(
            f"{recipe.model} has several adapters, {names}; choose one, and {_merging(recipe, '…')} before training"
        )
    ((name, path),) = found.adapters.items()
    adapter = read_adapter(path, config)
    try:
        return replace(recipe, method=_method(recipe.method, adapter, config)), adapter
    except _Differs as error:
        raise TrainingError(
            f"training cannot go on from the adapter of {recipe.model}: {error}; change the recipe, or "
            f"{_merging(recipe, name)} and train that"
        ) from None


class _Differs(Exception):
    """What of the method the adapter does not have."""


def _method(method: Method, adapter: Adapter, config: ModelConfig) -> Method:
    if method.type == "full":
        raise _Differs("method.type is full, which changes the model beneath it")
    if method.dora:
        raise _Differs("method.dora is set, and it is a plain LoRA")
    if method.layers is not None:
        raise _Differs("method.layers makes another model, to which it does not belong")
    ranks = Counter(change.rank for change in adapter.changes.values())
    if len(ranks) > 1:
        raise _Differs(f"its matrices have several ranks, {', '.join(map(str, sorted(ranks)))}")
    (rank,) = ranks
    if method.rank not in (None, rank):
        raise _Differs(f"method.rank is {method.rank}, and its rank is {rank}")
    kinds = tuple(kind for kind in LINEAR_LAYERS if any(is_target(name, (kind,)) for name in adapter.changes))
    if method.targets is not None and set(method.targets) != set(kinds):
        raise _Differs(f"method.targets are {', '.join(method.targets)}, and it changes {', '.join(kinds)}")
    if set(adapter.changes) != {name for name in tensor_shapes(config) if is_target(name, kinds)}:
        raise _Differs(f"it changes {', '.join(kinds)} of some layers, and a recipe those of all")
    return replace(method, rank=rank, targets=kinds, alpha=method.alpha or _alpha(method, adapter, rank))


def _alpha(method: Method, adapter: Adapter, rank: int) -> float | None:
    """That of the scale which most matrices have, where LoRA may have it; others' goes into their B."""
    scale = Counter(change.scale for change in adapter.changes.values()).most_common(1)[0][0]
    return scale * (math.sqrt(rank) if method.rank_stabilised else rank) if scale > 0 else None


def _merging(recipe: Recipe, adapter: str) -> str:
    return f"make one model of both (`puna merge {recipe.model} {adapter} merged.gguf`)"
