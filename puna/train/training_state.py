"""The state of a training on disk: folders ``step-N`` that appear whole or not at all, of safetensors and JSON.

One process writes one file. Several write a file each, its rows of every tensor, by torch.distributed.checkpoint, which
reads them on any number of processes.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import is_initialized
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from puna.checkpoint.atomic import atomic_folder
from puna.checkpoint.json_file import read_json, write_json
from puna.checkpoint.safetensors import StoredTensor, map_safetensors, write_stored
from puna.errors import TrainingError
from puna.train.parallel import ALONE, Ranks, empty_rows_of, fill

_STEP = re.compile(r"step-(\d+)")
_FILE = "model.safetensors"  # of a state of one process


@dataclass(frozen=True)
class TrainingState:
    """After ``step`` steps: where the stream of data is, and all tensors that training changes.

    ``cost`` is the held-out rows' loss, or minus their reward; None where they were not measured.

    ``tensors`` of a state on disk are whole, read when they are asked for; of one to be saved they may be sharded.
    """

    step: int
    stream: dict[str, Any]
    cost: float | None
    tensors: Mapping[str, Tensor]


def save_state(folder: Path, state: TrainingState, keep: int, ranks: Ranks = ALONE) -> None:
    """Write ``folder/step-N``, then delete all but the newest ``keep`` and the best. All ranks have to call it.

    Raises CheckpointError.
    """
    if ranks.first:
        with atomic_folder(folder / f"step-{state.step}") as temporary:
            _write_tensors(Path(ranks.tell(str(temporary))), state.tensors, ranks)
            raw = {"step": state.step, "stream": state.stream, "cost": state.cost}
            write_json(temporary / "state.json", raw)
        _rotate(folder, keep)
    else:
        _write_tensors(Path(ranks.tell("")), state.tensors, ranks)
    ranks.wait()


def newest_state(folder: Path) -> TrainingState | None:
    """The state after the most steps, or None. What a killed process left half written is removed.

    Raises CheckpointError or TrainingError when the state is damaged.
    """
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    steps = _steps(folder)
    return _read(folder / f"step-{steps[-1]}") if steps else None


def best_state(folder: Path) -> TrainingState | None:
    """The state of the lowest cost, of equal ones the last; None where none was measured."""
    step = _best(folder)
    return None if step is None else _read(folder / f"step-{step}")


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Without reading those of a state on disk."""
    if isinstance(tensors, _Stored):
        return tensors.shapes
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_into(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Fill these, which may be sharded, from a state on disk; all ranks that have a part of them together."""
    assert isinstance(tensors, _Stored)
    tensors.read_into(into)


def shared_out(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of a state on disk: a tensor is sharded as the parameter whose name its own begins with."""
    assert isinstance(tensors, _Stored)
    found: dict[str, Tensor] = {}
    for name, shape in tensors.shapes.items():
        like, dtype = parameters[name.split(":")[0]], tensors.dtypes[name]
        found[name] = empty_rows_of(like, shape, dtype)
    tensors.read_into(found)
    return found


class _Stored(Mapping[str, Tensor]):
    """Tensors on disk, of which shapes and types are known."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, torch.dtype]) -> None:
        self.shapes, self.dtypes = shapes, dtypes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill these, which may be sharded."""
        for name, tensor in tensors.items():
            fill(tensor, self[name])


class _OneFile(_Stored):
    """Written by one process; float64 as int64, which safetensors that Puna reads have."""

    def __init__(self, path: Path) -> None:
        self._stored = map_safetensors(path)
        dtypes = {name: _DTYPES[stored.dtype] for name, stored in self._stored.items()}
        super().__init__({name: stored.shape for name, stored in self._stored.items()}, dtypes)

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self._stored[name].array().copy()).view(self.dtypes[name])


class _Shards(_Stored):
    """Written by several processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        known = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        found = {name: one for name, one in known.items() if isinstance(one, TensorStorageMetadata)}
        dtypes = {name: one.properties.dtype for name, one in found.items()}
        super().__init__({name: tuple(one.size) for name, one in found.items()}, dtypes)

    def __getitem__(self, name: str) -> Tensor:
        tensor = torch.empty(self.shapes[name], dtype=self.dtypes[name])
        self._read({name: tensor}, alone=True)
        return tensor

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        self._read(dict(tensors), alone=not is_initialized())

    def _read(self, tensors: dict[str, Any], alone: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that one process reads what several wrote, as it is meant to
            load(tensors, storage_reader=HuggingFaceStorageReader(str(self._folder)), no_dist=alone)


_DTYPES = {"F32": torch.float32, "I64": torch.float64, "U8": torch.uint8}
_VIEWED = {torch.float64: torch.int64}


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    if ranks.count == 1:
        whole = (
            StoredTensor.from_array(name, tensor.cpu().view(_VIEWED.get(tensor.dtype, tensor.dtype)).numpy())
            for name, tensor in tensors.items()
        )
        write_stored(folder, tensors, whole, max_shard_bytes=1 << 62)
        return
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    save(dict(tensors), storage_writer=writer)


def _read(path: Path) -> TrainingState:
    raw = read_json(path / "state.json")
    if not isinstance(raw.get("step"), int) or not isinstance(raw.get("stream"), dict):
        raise TrainingError(f"{path / 'state.json'} is damaged; delete {path} to continue from an earlier state")
    tensors = _OneFile(path / _FILE) if (path / _FILE).exists() else _Shards(path)
    return TrainingState(raw["step"], raw["stream"], raw.get("cost"), tensors)


def _rotate(folder: Path, keep: int) -> None:
    steps = _steps(folder)
    kept = {*steps[-keep:], _best(folder)}
    for step in steps:
        if step not in kept:
            # Renamed first, so that one that is half deleted is never taken for a state.
            doomed = folder / f".step-{step}.partial"
            (folder / f"step-{step}").rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _best(folder: Path) -> int | None:
    costs = {step: read_json(folder / f"step-{step}" / "state.json").get("cost") for step in _steps(folder)}
    known = {step: cost for step, cost in costs.items() if isinstance(cost, float)}
    return min(known, key=lambda step: (known[step], -step), default=None)


def _steps(folder: Path) -> list[int]:
    matches = (_STEP.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)
