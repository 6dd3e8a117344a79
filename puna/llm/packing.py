"""Packed files: made once from a model, mapped at every later start."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint import Checkpoint, open_checkpoint
from puna.checkpoint.atomic import atomic_path
from puna.errors import CheckpointError, RequestError
from puna.model.model import Model
from puna.model.shapes import tensor_shapes
from puna.ops.packed_file import packed_error, read_packed, write_packed
from puna.ops.protocol import Ops, UploadedWeight
from puna.store import ResolvedModel
from puna.store.packs import mark_used
from puna.tensor import Weight

if TYPE_CHECKING:
    from puna.ops.native_ops import NativeOps

EMBEDDING = "model.embed_tokens.weight"


def bind_model(ops: Ops, found: ResolvedModel, checkpoint: Checkpoint, *, packed: bool) -> Model:
    """The model on these ops, its matrices from its packed file where there is a sound one and ``packed`` is true."""
    ready = _packed_weights(ops, found, checkpoint) if packed else {}
    return Model.bind(ops, checkpoint.config, checkpoint.tensors, ready)


def pack_model(found: ResolvedModel, ops: Ops) -> Path:
    """Write the packed file of a model, all or nothing, and return its path.

    Raises RequestError on ops that pack nothing, CheckpointError for an unreadable model or a disk that refuses.
    """
    native = _native(ops)
    if native is None:
        raise RequestError(f"the {ops.name} ops pack nothing; packed files are for the native ones")
    checkpoint = open_checkpoint(found.path)
    tensors = checkpoint.tensors
    names = _multiplied(checkpoint)

    with atomic_path(found.packed) as path:
        matrices = [(native.packed_matrix(tensors[name]), partial(_panels, native, tensors, name)) for name in names]
        write_packed(path, native.panel_layout, found.identity, matrices)
    return found.packed


def _panels(ops: NativeOps, tensors: Mapping[str, Weight], name: str) -> NDArray[np.uint8]:
    return ops.pack(tensors[name])


def _packed_weights(ops: Ops, found: ResolvedModel, checkpoint: Checkpoint) -> Mapping[str, UploadedWeight]:
    """The uploaded matrices of the model's packed file; none, with a warning, where that is of no use."""
    native = _native(ops)
    if native is None or not found.packed.is_file():
        return {}
    expected = _multiplied(checkpoint)
    weights = {}
    try:
        file = read_packed(found.packed, native.panel_layout, found.identity)
        for name, matrix in file.matrices.items():
            if expected.get(name) != (matrix.rows, matrix.columns):
                raise packed_error(file.path, f"the model has no matrix {name[:100]!a} of that shape")
            rows = checkpoint.tensors[name] if name == EMBEDDING else None
            weights[name] = native.packed_weight(file, matrix, rows)
    except (CheckpointError, OSError) as error:
        warnings.warn(str(error), stacklevel=2)
        return {}
    mark_used(found.packed)
    return weights


def _multiplied(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The matrices that are multiplied by: all but an embedding that is no head."""
    tied = checkpoint.config.tie_word_embeddings
    shapes = tensor_shapes(checkpoint.config)
    return {name: s for name, s in shapes.items() if len(s) == 2 and (tied or name != EMBEDDING)}


def _native(ops: Ops) -> NativeOps | None:
    if ops.name != "native":
        return None
    from puna.ops.native_ops import NativeOps  # the extension is there

    assert isinstance(ops, NativeOps)
    return ops
