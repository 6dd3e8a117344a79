"""A smaller model made of a larger one's layers: where a student of distillation begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from puna.checkpoint import Checkpoint
from puna.errors import TrainingError
from puna.tensor import Weight

_PREFIX = "model.layers."


def student_of(checkpoint: Checkpoint, layers: Sequence[int] | None = None) -> Checkpoint:
    """The model with only these of its ``layers``, in their order: every second by default (Sanh et al. 2019, §3).

    Embeddings, norms, head and tokenizer stay the same, and no weight is read before it is asked for. Raises
    TrainingError for layers that the model has not, or that are given twice.
    """
    count = checkpoint.config.num_hidden_layers
    kept = list(range(0, count, 2)) if layers is None else list(layers)
    if not kept or len(set(kept)) < len(kept) or not all(0 <= layer < count for layer in kept):
        raise TrainingError(f"the layers of a student must be different ones of 0 to {count - 1}, found {kept}")
    config = replace(checkpoint.config, num_hidden_layers=len(kept))
    return replace(checkpoint, config=config, tensors=_Layers(checkpoint.tensors, kept))


class _Layers(Mapping[str, Weight]):
    def __init__(self, tensors: Mapping[str, Weight], kept: Sequence[int]) -> None:
        self._tensors = tensors
        self._sources = {}  # the student's name -> the model's
        place = {layer: number for number, layer in enumerate(kept)}
        for name in tensors:
            layer, _, rest = name.removeprefix(_PREFIX).partition(".")
            if not name.startswith(_PREFIX):
                self._sources[name] = name
            elif int(layer) in place:
                self._sources[f"{_PREFIX}{place[int(layer)]}.{rest}"] = name

    def __getitem__(self, name: str) -> Weight:
        return self._tensors[self._sources[name]].rename(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)
