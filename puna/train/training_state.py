"""The state of a training on disk: folders ``step-N`` that appear whole or not at all, of safetensors and JSON."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from puna.checkpoint.atomic import atomic_folder
from puna.checkpoint.json_file import read_json, write_json
from puna.checkpoint.safetensors import read_safetensors, write_safetensors
from puna.errors import TrainingError
from puna.tensor import QUANT_TYPES, Weight

_STEP = re.compile(r"step-(\d+)")
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class TrainingState:
    """After ``step`` steps: where the stream of data is, and all tensors that training changes (one dtype)."""

    step: int
    stream: dict[str, Any]
    validation_loss: float | None
    tensors: Mapping[str, Tensor]


def save_state(folder: Path, state: TrainingState, keep: int) -> Path:
    """Write ``folder/step-N``, then delete all but the newest ``keep`` and the best. Raises CheckpointError."""
    dtype = next(iter(state.tensors.values())).dtype
    raw = {
        "step": state.step,
        "stream": state.stream,
        "validation_loss": state.validation_loss,
        "dtype": str(dtype).removeprefix("torch."),
    }
    path = folder / f"step-{state.step}"
    with atomic_folder(path) as temporary:
        write_safetensors(temporary, {n: _bits(n, t) for n, t in state.tensors.items()}, max_shard_bytes=1 << 62)
        write_json(temporary / "state.json", raw)
    _rotate(folder, keep)
    return path


def newest_state(folder: Path) -> TrainingState | None:
    """The state after the most steps, or None. What a killed process left half written is removed.

    Raises CheckpointError or TrainingError when the state is damaged.
    """
    for left in folder.glob(".step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)
    steps = _steps(folder)
    return _read(folder / f"step-{steps[-1]}") if steps else None


def best_state(folder: Path) -> TrainingState | None:
    """The state of the lowest validation loss; None where none was validated."""
    step = _best(folder)
    return None if step is None else _read(folder / f"step-{step}")


def _read(path: Path) -> TrainingState:
    raw = read_json(path / "state.json")
    dtype = _DTYPES.get(raw.get("dtype", ""))
    if dtype is None or not isinstance(raw.get("step"), int) or not isinstance(raw.get("stream"), dict):
        raise TrainingError(f"{path / 'state.json'} is damaged; delete {path} to continue from an earlier state")
    weights = read_safetensors(path / "model.safetensors")
    tensors = {name: torch.from_numpy(np.array(w.data)).view(dtype) for name, w in weights.items()}
    return TrainingState(raw["step"], raw["stream"], raw.get("validation_loss"), tensors)


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
    losses = {step: read_json(folder / f"step-{step}" / "state.json").get("validation_loss") for step in _steps(folder)}
    known = {step: loss for step, loss in losses.items() if isinstance(loss, float)}
    return min(known, key=lambda step: (known[step], step), default=None)


def _steps(folder: Path) -> list[int]:
    matches = (_STEP.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def _bits(name: str, tensor: Tensor) -> Weight:
    """As float32 bit for bit; a float64 tensor has twice the columns."""
    values = tensor.detach().cpu().contiguous().view(torch.float32).numpy()
    return Weight(name, values.shape, QUANT_TYPES["F32"], values.view(np.uint8))
