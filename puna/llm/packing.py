"""Packed files: made once from a model, mapped at every later start."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint import Checkpoint, open_checkpoint
from puna.checkpoint.atomic import atomic_path
from puna.errors import CheckpointError, RequestError
from puna.model.model import Model
from puna.model.shapes import tensor_shapes
from puna.ops.packed_file import PackedMatrix, is_packed, packed_error, read_packed, write_packed
from puna.ops.protocol import Ops, UploadedWeight
from puna.store import ResolvedModel
from puna.store.packs import make_room, mark_used

if TYPE_CHECKING:
    from puna.ops.native_ops import NativeOps

EMBEDDING = "model.embed_tokens.weight"
HEADER_BYTES_PER_MATRIX = 256  # about 180, and alignment


def bind_model(ops: Ops, found: ResolvedModel, checkpoint: Checkpoint, *, packed: bool | Path) -> Model:
    """The model on these ops, its matrices from its packed file where there is a sound one and ``packed`` is true.

    ``packed`` may name the file: then nothing else will do. Raises CheckpointError when it is not this model's, and
    RequestError when these ops use none.

    Where the environment variable PUNA_PACK_CACHE bounds the store's packed files (``4GB``), a stored model without one
    gets one first. Raises RequestError when that is no size.
    """
    native = _native(ops) if packed else None
    if isinstance(packed, Path):
        if native is None:
            raise RequestError(f"the {ops.name} ops use no packed file; leave out {packed}, or use the native ones")
        ready = _read_weights(native, replace(found, packed=packed), checkpoint)
        return Model.bind(ops, checkpoint.config, checkpoint.tensors, ready)
    if native is None:
        return Model.bind(ops, checkpoint.config, checkpoint.tensors)
    ready = _packed_weights(native, found, checkpoint)
    if not ready and found.manifest is not None and _write_to_cache(native, found, checkpoint):
        ready = _packed_weights(native, found, checkpoint)
    return Model.bind(ops, checkpoint.config, checkpoint.tensors, ready)


def pack_model(found: ResolvedModel, ops: Ops, out: Path | None = None) -> Path:
    """Write the packed file of a model, all or nothing, and return its path: ``out``, or where starts look for it.

    Raises RequestError on ops that pack nothing and where ``out`` is another kind of file, CheckpointError for an
    unreadable model or a disk that refuses.
    """
    native = _native(ops)
    if native is None:
        raise RequestError(f"the {ops.name} ops pack nothing; packed files are for the native ones")
    if out is not None:
        if out.exists() and not is_packed(out):
            raise RequestError(f"{out} is there already and no packed file; choose another name")
        found = replace(found, packed=out)
    _write(native, found, open_checkpoint(found.path))
    return found.packed


def _write(ops: NativeOps, found: ResolvedModel, checkpoint: Checkpoint) -> None:
    tensors = checkpoint.tensors

    def described(name: str) -> tuple[PackedMatrix, Callable[[], NDArray[np.uint8]]]:
        return ops.packed_matrix(tensors[name]), lambda: ops.pack(tensors[name])

    with atomic_path(found.packed) as path:
        write_packed(path, ops.panel_layout, found.identity, map(described, _multiplied(checkpoint)))


def _write_to_cache(ops: NativeOps, found: ResolvedModel, checkpoint: Checkpoint) -> bool:
    """Write a stored model's packed file within PUNA_PACK_CACHE; False when there is no bound, no room, or no disk."""
    bound = _parse_size(os.environ.get("PUNA_PACK_CACHE") or "0")
    if not bound:
        return False
    matrices = [ops.packed_matrix(checkpoint.tensors[name]) for name in _multiplied(checkpoint)]
    size = sum(matrix.size + HEADER_BYTES_PER_MATRIX for matrix in matrices)
    if not make_room(found.packed.parent, size, bound):
        return False
    try:
        _write(ops, found, checkpoint)
    except CheckpointError as error:
        warnings.warn(f"{found.manifest and found.manifest.model_name} was not packed: {error}", stacklevel=2)
        return False
    return True


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"(\d{1,15})\s*([kMGT]?)B?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise RequestError(f"PUNA_PACK_CACHE must be a size such as 4GB, found {text[:50]!r}")
    power = " KMGT".index(match[2].upper() or " ")
    return int(match[1] + 3 * power * "0")


def _packed_weights(ops: NativeOps, found: ResolvedModel, checkpoint: Checkpoint) -> Mapping[str, UploadedWeight]:
    """The uploaded matrices of the model's packed file; none, with a warning, where that is of no use."""
    try:
        if not found.packed.is_file():
            return {}
        weights = _read_weights(ops, found, checkpoint)
    except (CheckpointError, OSError) as error:
        warnings.warn(str(error), stacklevel=2)
        return {}
    mark_used(found.packed)
    return weights


def _read_weights(ops: NativeOps, found: ResolvedModel, checkpoint: Checkpoint) -> Mapping[str, UploadedWeight]:
    """The uploaded matrices of the model's packed file. Raises CheckpointError, OSError."""
    expected = _multiplied(checkpoint)
    weights = {}
    file = read_packed(found.packed, ops.panel_layout, found.identity)
    for name, matrix in file.matrices.items():
        if expected.get(name) != (matrix.rows, matrix.columns):
            raise packed_error(file.path, f"the model has no matrix {name[:100]!a} of that shape")
        rows = checkpoint.tensors[name] if name == EMBEDDING else None
        weights[name] = ops.packed_weight(file, matrix, rows)
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
