"""RecordingOps: every linear's input, by the weight's name, and the same logits as without."""

import numpy as np
import pytest
from tiny_models import tiny_checkpoint, tiny_config

from puna.llm import scoring
from puna.model.model import Model
from puna.ops.recording import RecordingOps
from puna.ops.registry import make_ops


@pytest.mark.parametrize("ops", ["reference", "native"])
@pytest.mark.parametrize("tied", [False, True])
def test_each_linear_is_seen_once_a_step_and_nothing_changes(ops: str, tied: bool) -> None:
    if ops == "native":
        pytest.importorskip("puna.ops.native_ops")
    checkpoint = tiny_checkpoint(tiny_config(tie_word_embeddings=tied, num_hidden_layers=1))
    seen: dict[str, np.ndarray] = {}

    def observe(names, x) -> None:
        for name in names:
            assert name not in seen
            seen[name] = x.copy()

    recording = RecordingOps(make_ops(ops), observe)
    ids = [1, 5, 9, 200]
    found = scoring.logits(Model.bind(recording, checkpoint.config, checkpoint.tensors), ids)
    plain = scoring.logits(Model.bind(make_ops(ops), checkpoint.config, checkpoint.tensors), ids)
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-5)

    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert set(seen) == {name for name in checkpoint.tensors if "proj" in name} | {head}
    weights = {name: weight.dequantize() for name, weight in checkpoint.tensors.items()}
    embedded = weights["model.embed_tokens.weight"][ids]
    normed = embedded / np.sqrt((embedded**2).mean(axis=1, keepdims=True) + checkpoint.config.rms_norm_eps)
    expected = normed * weights["model.layers.0.input_layernorm.weight"]
    np.testing.assert_allclose(seen["model.layers.0.self_attn.v_proj.weight"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen[head] @ weights[head].T, plain, rtol=1e-3, atol=1e-3)
    assert seen["model.layers.0.mlp.down_proj.weight"].shape == (4, checkpoint.config.intermediate_size)
