"""GPTQ and AWQ folders that we write, as GPTQModel opens and computes them.

GPTQModel asks for a torch of its own, of gigabytes, so no environment of ours installs it; beside the torch that is
there: pip install --no-deps --no-build-isolation gptqmodel defuser device-smi logbar pypcre tokenicer threadpoolctl
datasets dill multiprocess pandas torchao.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import tiny_checkpoint, tiny_config
from tokenizers import Tokenizer, models

from puna.checkpoint import open_checkpoint
from puna.model.model import Model
from puna.ops.reference import ReferenceOps
from puna.quantize.calibration import divergence, log_probabilities
from puna.quantize.folder import quantize_folder
from puna.quantize.folder_settings import FolderSettings

gptqmodel = pytest.importorskip("gptqmodel", reason="GPTQModel is not installed (see the file)")
torch = pytest.importorskip("torch")

WINDOWS = [np.random.default_rng(i).integers(0, 256, 48).tolist() for i in range(4)]

# GPTQModel 7.7 refuses the first version with zero points unless it wrote the folder itself.
SETTINGS = {
    "gptq-symmetric": FolderSettings("gptq", 32, symmetric=True),
    "gptq-v2": FolderSettings("gptq", 32, zero_points="v2"),
    "int4-as-gptq": FolderSettings("int4", 64, symmetric=True, layout="gptq"),
    "awq": FolderSettings("awq", 32),
    "int4-as-awq": FolderSettings("int4", 32, layout="awq"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_gptqmodel_computes_the_same(tmp_path: Path, name: str) -> None:
    settings, path = SETTINGS[name], tmp_path / "m"
    source = tiny_checkpoint(tiny_config(hidden_size=128, intermediate_size=256, head_dim=32))
    quantize_folder(source, path, settings, WINDOWS if settings.method in ("gptq", "awq") else None)
    Tokenizer(models.WordLevel({f"t{i}": i for i in range(256)}, "t0")).save(str(path / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t2"}
    (path / "tokenizer_config.json").write_text(json.dumps(kind))
    backend = gptqmodel.BACKEND.AWQ_TORCH if settings.stored_as == "awq" else gptqmodel.BACKEND.GPTQ_TORCH
    theirs = gptqmodel.GPTQModel.load(str(path), backend=backend, device="cpu", dtype=torch.float16)
    with torch.no_grad():
        logits = theirs.model(torch.tensor([WINDOWS[0]])).logits[0].double()
    checkpoint = open_checkpoint(path)
    ours = log_probabilities(Model.bind(ReferenceOps(), checkpoint.config, checkpoint.tensors), WINDOWS[0])
    assert divergence(torch.log_softmax(logits, -1).numpy(), ours) < 1e-4  # it computes in float16
