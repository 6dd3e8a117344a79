"""Folders of quantized weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint.checkpoint import Checkpoint
from puna.checkpoint.huggingface import write_model_folder
from puna.checkpoint.recode import encoded_pieces, float_type
from puna.checkpoint.safetensors import StoredTensor, write_stored
from puna.tensor import Weight

_MOST_TENSORS = 8  # of one module

Progress = Callable[[str, int, int], None]
WriteModule = Callable[[str, Weight], Iterable[StoredTensor]]


def is_quantized_matrix(name: str) -> bool:
    """Whether quantized folders hold this tensor quantized: the linears of layers, neither embedding nor head."""
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def write_quantized_folder(
    checkpoint: Checkpoint,
    path: Path,
    quantization: dict[str, Any],
    write_module: WriteModule,
    progress: Progress | None = None,
) -> None:
    """A model folder whose linears are the tensors that ``write_module(module, weight)`` makes of them.

    ``quantization`` is its ``quantization_config``. Other tensors are stored as float16. ``progress`` gets a tensor's
    name, how many came before it, and how many there are.
    """

    def tensors() -> Iterator[StoredTensor]:
        for number, name in enumerate(checkpoint.tensors):
            if progress:
                progress(name, number, len(checkpoint.tensors))
            weight = checkpoint.tensors[name]
            if is_quantized_matrix(name):
                yield from write_module(name.removesuffix(".weight"), weight)
            else:
                yield _as_half(weight)

    # The names of all tensors are not known before they are made: room for the longest.
    names = [f"{name}{'x' * 40}" for name in checkpoint.tensors for _ in range(_MOST_TENSORS)]
    extra = {"torch_dtype": "float16", "quantization_config": quantization}
    write_model_folder(checkpoint, path, extra, lambda folder: write_stored(folder, names, tensors()))


def _as_half(weight: Weight) -> StoredTensor:
    kind = float_type(weight, "F16")
    data = np.concatenate([piece.reshape(-1) for piece in encoded_pieces(weight, kind)])
    return StoredTensor(weight.name, kind.name, weight.shape, data)
