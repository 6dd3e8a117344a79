"""SmoothQuant on models with outliers among their inputs, computed as W8A8 programs do: every input in 8 bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VARIANTS, tiny_checkpoint

from puna.checkpoint import Checkpoint, open_checkpoint
from puna.checkpoint.safetensors import map_safetensors
from puna.model.model import Model
from puna.ops.reference import ReferenceOps
from puna.quantize.calibrated import calibrated
from puna.quantize.calibration import divergence, log_probabilities
from puna.quantize.folder import quantize_folder
from puna.quantize.folder_settings import FolderSettings
from puna.quantize.layerwise import STAGES, LayerByLayer
from puna.quantize.smoothquant import InputSamples, rounded_rows, smoothquant
from puna.tensor import Weight

WINDOWS = [np.random.default_rng(i).integers(0, 256, 40).tolist() for i in range(4)]
SIZE, VOCABULARY = 128, 512


class EightBitInputs(ReferenceOps):
    """Reads the input of every linear but the head as int8 with one scale a token, as vLLM's int8 kernels do.

    Written after compressed-tensors' definition, not with what is tested.
    """

    def linear(self, x: Any, w: Any, bias: Any = None, residual: Any = None) -> Any:
        if len(w) < VOCABULARY:
            scale = np.maximum(np.abs(x).max(axis=1, keepdims=True), 1e-12) / 127
            x = (np.clip(np.round(x / scale), -127, 127) * scale).astype(np.float32)
        return super().linear(x, w, bias, residual)


def with_outliers(checkpoint: Checkpoint, factor: float) -> Checkpoint:
    """The same function: some channels after each norm are ``factor`` times as large, what reads them is smaller."""
    tensors = dict(checkpoint.tensors)
    channels = np.array([3, 17, 40])
    for layer in range(checkpoint.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm, stage in (("input_layernorm", STAGES[0]), ("post_attention_layernorm", STAGES[2])):
            for name in (norm, *stage):
                values = tensors[f"{prefix}{name}.weight"].dequantize().copy()
                values[..., channels] *= factor if name == norm else 1 / factor
                tensors[f"{prefix}{name}.weight"] = Weight.from_array(f"{prefix}{name}.weight", values)
    return replace(checkpoint, tensors=tensors)


def windows(checkpoint: Checkpoint, path: Path, count: int) -> list[list[int]]:
    assert checkpoint.tokenizer is not None
    ids = checkpoint.tokenizer.encode(path.read_text(encoding="utf-8")[:20_000])
    return [ids[at * SIZE : (at + 1) * SIZE] for at in range(count)]


def losses(checkpoint: Checkpoint, calibration: list[list[int]], held_out: list[list[int]]) -> tuple[float, float]:
    """The KL of plain W8A8, and of SmoothQuant, both computed in 8 bits."""
    config = checkpoint.config
    model = Model.bind(ReferenceOps(), config, checkpoint.tensors)
    original = [log_probabilities(model, window) for window in held_out]
    plain = {name: rounded_rows(w.dequantize()) for name, w in checkpoint.tensors.items() if "_proj.weight" in name}
    smooth, matrices, _ = calibrated(checkpoint, FolderSettings("w8a8"), calibration)
    found = []
    for tensors, grouped in ((checkpoint.tensors, plain), (smooth.tensors, matrices)):
        dense = {name: Weight.from_array(name, matrix.dequantize()) for name, matrix in grouped.items()}
        changed = Model.bind(EightBitInputs(), config, {**tensors, **dense})
        pairs = zip(original, (log_probabilities(changed, window) for window in held_out), strict=True)
        found.append(float(np.mean([divergence(a, b) for a, b in pairs])))
    return found[0], found[1]


@pytest.mark.parametrize(("factor", "share"), [(1, 1.0), (30, 0.1), (200, 0.01)])
def test_it_loses_less_than_not_smoothing(shared_data: Path, factor: float, share: float) -> None:
    checkpoint = with_outliers(open_checkpoint(shared_data / "weights" / "stories260K" / "hf"), factor)
    calibration = windows(checkpoint, shared_data / "text" / "wizard_of_oz_248k.txt", 8)
    held_out = windows(checkpoint, shared_data / "text" / "tinyshakespeare.txt", 4)
    plain, smooth = losses(checkpoint, calibration, held_out)
    assert smooth <= share * plain
    assert smooth < 0.005


@pytest.mark.parametrize("name", ["gqa", "mha", "both_biases"])
def test_the_layer_stays_what_it_was(name: str) -> None:
    checkpoint = with_outliers(tiny_checkpoint(VARIANTS[name]), 20)
    before, after = (LayerByLayer(checkpoint.config, checkpoint.tensors, WINDOWS) for _ in range(2))
    values, inputs = {key: numbers.copy() for key, numbers in before.values.items()}, InputSamples(len(WINDOWS))
    before.show(inputs.see)
    matrices = smoothquant(values, inputs)
    assert not np.array_equal(values["input_layernorm.weight"], after.values["input_layernorm.weight"])
    after.values = dict(values)
    after.advance()
    for one, other in zip(before._states, after._states, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    for key, grouped in matrices.items():
        error = np.abs(grouped.dequantize() - values[f"{key}.weight"])
        assert (error <= 0.008 * np.abs(values[f"{key}.weight"]).max(axis=1, keepdims=True)).all()


def test_the_folder_holds_it(tmp_path: Path) -> None:
    checkpoint, settings = tiny_checkpoint(), FolderSettings("w8a8")
    quantize_folder(checkpoint, tmp_path / "m", settings, WINDOWS)
    smooth, matrices, _ = calibrated(checkpoint, settings, WINDOWS)
    stored, opened = map_safetensors(tmp_path / "m" / "model.safetensors"), open_checkpoint(tmp_path / "m")
    for name, weight in smooth.tensors.items():
        if name in matrices:
            module = name.removesuffix(".weight")
            assert (stored[name].dtype, stored[f"{module}.weight_scale"].shape) == ("I8", (weight.shape[0], 1))
            np.testing.assert_array_equal(opened.tensors[name].dequantize(), matrices[name].dequantize())
            assert opened.tensors[name].type.name == "Q8_0"
        else:
            np.testing.assert_allclose(opened.tensors[name].dequantize(), weight.dequantize(), rtol=2**-11, atol=1e-6)
    raw = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    group = raw["config_groups"]["group_0"]
    assert (raw["format"], group["weights"]["strategy"]) == ("int-quantized", "channel")
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
