"""On a real model and held-out text GPTQ and AWQ lose less than rounding at the same 4 bits a weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from puna.checkpoint import Checkpoint, open_checkpoint
from puna.model.model import Model
from puna.ops.reference import ReferenceOps
from puna.quantize.calibrated import calibrated
from puna.quantize.calibration import divergence, log_probabilities
from puna.quantize.folder import rounded
from puna.quantize.folder_settings import FolderSettings
from puna.tensor import Weight

SIZE = 128


def windows(checkpoint: Checkpoint, path: Path, count: int) -> list[list[int]]:
    assert checkpoint.tokenizer is not None
    ids = checkpoint.tokenizer.encode(path.read_text(encoding="utf-8")[:20_000])
    return [ids[at * SIZE : (at + 1) * SIZE] for at in range(count)]


def predictions(config: object, tensors: dict[str, Weight], text: list[list[int]]) -> list[np.ndarray]:
    model = Model.bind(ReferenceOps(), config, tensors)
    return [log_probabilities(model, window) for window in text]


def test_gptq_and_awq_beat_plain_rounding(shared_data: Path) -> None:
    checkpoint = open_checkpoint(shared_data / "weights" / "stories260K" / "hf")
    calibration = windows(checkpoint, shared_data / "text" / "wizard_of_oz_248k.txt", 8)
    held_out = windows(checkpoint, shared_data / "text" / "tinyshakespeare.txt", 4)
    original = predictions(checkpoint.config, dict(checkpoint.tensors), held_out)
    losses = {}
    for method in ("int4", "awq", "gptq"):
        settings = FolderSettings(method, 32)
        changed = checkpoint
        if method == "int4":
            names = [name for name in checkpoint.tensors if name.endswith("_proj.weight")]
            matrices = {name: rounded(checkpoint.tensors[name], settings) for name in names}
        else:
            changed, matrices, _ = calibrated(checkpoint, settings, calibration)
        tensors = dict(changed.tensors) | {name: grouped.as_weight(name) for name, grouped in matrices.items()}
        found = predictions(checkpoint.config, tensors, held_out)
        losses[method] = np.mean([divergence(a, b) for a, b in zip(original, found, strict=True)])
    assert losses["awq"] < 0.95 * losses["int4"]
    assert losses["gptq"] < 0.85 * losses["int4"]
    assert losses["int4"] < 0.5
