"""LoRA adapters in: what PEFT saves and computes, the same as GGUF, and everything that must be refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_files import write_lora_gguf, write_peft_tensors
from tiny_models import VARIANTS, random_weights

from puna.checkpoint.lora import read_adapter
from puna.errors import CheckpointError, PunaError
from puna.gguf_file import read_gguf
from puna.model.model import Model
from puna.ops.protocol import Batch
from puna.ops.reference import ReferenceOps
from puna.tensor import Adapter, LowRank

CONFIG = VARIANTS["gqa"]
Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


def peft_tensors() -> dict[str, np.ndarray]:
    """A change of rank 3 of one query projection, and one of rank 5 of one down projection."""
    prefix = "base_model.model.model.layers."
    rng = np.random.default_rng(0)
    return {
        f"{prefix}0.self_attn.q_proj.lora_A.weight": rng.standard_normal((3, 64), np.float32),
        f"{prefix}0.self_attn.q_proj.lora_B.weight": rng.standard_normal((64, 3), np.float32),
        f"{prefix}1.mlp.down_proj.lora_A.weight": rng.standard_normal((5, 96), np.float32),
        f"{prefix}1.mlp.down_proj.lora_B.weight": rng.standard_normal((64, 5), np.float32),
    }


def write_peft(folder: Path, tensors: dict[str, np.ndarray] | None = None, **fields: Any) -> Path:
    return write_peft_tensors(folder, peft_tensors() if tensors is None else tensors, **fields)


class TestPeft:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_rslora": True, "init_lora_weights": "gaussian"},
            {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 9}, "alpha_pattern": {"v_proj": 5}},
            {"alpha_pattern": {"layers.0.mlp.down_proj": 2.5, "mlp.down_proj": 40, "^o_proj": 99}, "use_rslora": True},
            {"target_modules": r".*layers\.1\.(self_attn\.k_proj|mlp\.up_proj)"},
        ],
        ids=["plain", "rslora", "patterns", "nested patterns", "a regular expression"],
    )
    def test_logits_are_those_of_peft(self, tmp_path: Path, options: dict[str, Any]) -> None:
        peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        weights = random_weights(CONFIG, seed=1)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG.to_hf())).eval().float()
        model.load_state_dict({name: torch.from_numpy(w.dequantize().copy()) for name, w in weights.items()})
        torch.manual_seed(0)
        model = peft.get_peft_model(
            model, peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear"} | options)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(tmp_path)
        ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, 40)
        with torch.no_grad():
            expected = model.eval()(torch.from_numpy(ids[None])).logits[0].numpy()
            with model.disable_adapter():
                bare = model(torch.from_numpy(ids[None])).logits[0].numpy()
        assert np.abs(expected - bare).max() > 0.1

        base = Model.bind(ReferenceOps(), CONFIG, weights)
        adapted = base.adapted([base.upload(read_adapter(tmp_path, CONFIG))])
        batch = Batch(
            tokens=ids.astype(np.int32),
            positions=np.arange(40, dtype=np.int32),
            seq_starts=np.array([0, 40], np.int32),
            slots=np.arange(40, dtype=np.int32),
            block_tables=np.arange(3, dtype=np.int32)[None],
            context_lens=np.array([40], np.int32),
            logit_rows=np.arange(40, dtype=np.int32),
            adapters=np.zeros(1, np.int32),
        )
        found = adapted.forward(batch, base.ops.new_kv(CONFIG, 3, 16))
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()

    def test_what_is_read(self, tmp_path: Path) -> None:
        folder = write_peft(tmp_path / "adapter", alpha_pattern={"mlp.down_proj": 20})
        arrays = list(peft_tensors().values())
        for path in (folder, str(folder), folder / "adapter_config.json", folder / "adapter_model.safetensors"):
            adapter = read_adapter(path, CONFIG)
            assert {name: (c.rank, c.scale) for name, c in adapter.changes.items()} == {Q: (3, 2.0), DOWN: (5, 4.0)}
            np.testing.assert_array_equal(adapter.changes[Q].a, arrays[0])
            np.testing.assert_array_equal(adapter.changes[DOWN].b, arrays[3])
            assert adapter.rank == 5
            assert adapter.nbytes == 4 * (3 * (64 + 64) + 5 * (96 + 64))

    def test_an_adapter_of_the_bare_model(self, tmp_path: Path) -> None:
        """PEFT on LlamaModel, whose modules have no ``model.`` before them."""
        bare = {name.replace("model.model.model.", "model.model."): a for name, a in peft_tensors().items()}
        expected = read_adapter(write_peft(tmp_path / "whole"), CONFIG)
        assert read_adapter(write_peft(tmp_path / "bare", bare), CONFIG).digest == expected.digest

    def test_the_file_may_change_afterwards(self, tmp_path: Path) -> None:
        folder = write_peft(tmp_path / "adapter")
        adapter = read_adapter(folder, CONFIG)
        before = adapter.changes[Q].a.copy()
        with (folder / "adapter_model.safetensors").open("r+b") as file:
            file.truncate(100)
        np.testing.assert_array_equal(adapter.changes[Q].a, before)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
            ({"peft_type": None}, "peft_type is None"),
            ({"use_dora": True}, "DoRA"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"bias": "all"}, "bias is 'all'"),
            ({"lora_bias": True}, "biases"),
            ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
            ({"alora_invocation_tokens": [1]}, "activated LoRA"),
            ({"layer_replication": [[0, 1]]}, "replicated layers"),
            ({"lora_alpha": "16"}, "lora_alpha must be a number"),
            ({"lora_alpha": True}, "lora_alpha must be a number"),
            ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
            ({"lora_alpha": 1e300}, "lora_alpha must be a number"),
            ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must map"),
            ({"alpha_pattern": {"(a+)+$": 1}}, "only plain module names"),
            ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern of q_proj must be a number"),
        ],
    )
    def test_a_config_that_is_not_plain_lora(self, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
        folder = tmp_path / "adapter"
        write_peft(folder, **fields)
        with pytest.raises(CheckpointError, match=message.replace("(", r"\(")) as caught:
            read_adapter(folder, CONFIG)
        assert str(folder) in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "shape", "message"),
        [
            ("layers.0.self_attn.q_proj.lora_B.weight", None, "q_proj lacks lora_B"),
            ("layers.0.self_attn.q_proj.lora_A.weight", (3, 32), r"\(3, 32\), expected \(3, 64\)"),
            ("layers.0.self_attn.q_proj.lora_A.weight", (4, 64), r"\(64, 3\), expected \(64, 4\)"),
            ("layers.0.self_attn.q_proj.lora_A.weight", (64,), r"lora_A .* has shape \(64,\)"),
            ("layers.0.self_attn.q_proj.lora_A.weight", (0, 64), r"has shape \(0, 64\)"),
            ("layers.7.mlp.up_proj.lora_A.weight", (3, 64), "model of 2 layers"),
            ("layers.0.input_layernorm.lora_A.weight", (3, 64), "no linear layer"),
            ("embed_tokens.lora_A.weight", (3, 64), "changes model.embed_tokens"),
            ("embed_tokens.lora_embedding_A", (3, 64), "not of a LoRA on a linear layer"),
            ("embed_tokens.weight", (256, 64), "not of a LoRA on a linear layer"),
            ("layers.0.mlp.up_proj.lora_magnitude_vector", (96,), "up_proj lacks lora_A"),
            ("layers.0.self_attn.q_proj.lora_magnitude_vector", (64,), "q_proj has a .* without DoRA"),
        ],
    )
    def test_tensors_that_do_not_fit(self, tmp_path: Path, name: str, shape: Any, message: str) -> None:
        name = f"base_model.model.model.{name}"
        tensors = peft_tensors() | {name: np.zeros(shape or 1, np.float32)}
        if shape is None:
            del tensors[name]
        with pytest.raises(CheckpointError, match=message):
            read_adapter(write_peft(tmp_path / "adapter", tensors), CONFIG)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_numbers_that_are_none(self, tmp_path: Path, value: float) -> None:
        tensors = peft_tensors()
        next(iter(tensors.values()))[1, 5] = value
        with pytest.raises(CheckpointError, match="not finite"):
            read_adapter(write_peft(tmp_path / "adapter", tensors), CONFIG)

    def test_files_that_are_missing(self, tmp_path: Path) -> None:
        folder = write_peft(tmp_path / "adapter")
        for remove, message in (("adapter_model.safetensors", "is missing"), ("adapter_config.json", "not an adapter")):
            (folder / remove).unlink()
            with pytest.raises(CheckpointError, match=message):
                read_adapter(folder, CONFIG)
        with pytest.raises(CheckpointError, match="does not exist"):
            read_adapter(tmp_path / "nowhere", CONFIG)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        (folder / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(CheckpointError, match="pickle"):
            read_adapter(folder, CONFIG)

    def test_an_empty_adapter(self, tmp_path: Path) -> None:
        folder = write_peft(tmp_path / "adapter")
        (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match="changes nothing"):
            read_adapter(folder, CONFIG)


class TestGGUF:
    def test_the_same_adapter_from_both_formats(self, tmp_path: Path) -> None:
        expected = read_adapter(write_peft(tmp_path / "adapter", lora_alpha=15, tensors=peft_tensors()), CONFIG)
        found = read_adapter(write_lora_gguf(tmp_path / "adapter.gguf", expected, CONFIG, 15), CONFIG)
        assert found.digest == expected.digest

    def test_rows_of_keys_follow_their_heads(self, tmp_path: Path) -> None:
        """Row 2i of an interleaved head is row i of a half-split one: values that say where they come from."""
        name = "model.layers.0.self_attn.k_proj.weight"
        b = np.arange(32, dtype=np.float32)[:, None]
        path = tmp_path / "adapter.gguf"
        write_lora_gguf(path, Adapter({name: LowRank(np.ones((1, 64), np.float32), b, 1.0)}), CONFIG, 1)
        stored = read_gguf(path).tensors["blk.0.attn_k.weight.lora_b"].dequantize()[:, 0]
        assert stored[:4].tolist() == [0, 8, 1, 9]
        np.testing.assert_array_equal(read_adapter(path, CONFIG).changes[name].b, b)

    def test_no_alpha_is_a_scale_of_one(self, tmp_path: Path) -> None:
        adapter = read_adapter(write_peft(tmp_path / "adapter"), CONFIG)
        found = read_adapter(write_lora_gguf(tmp_path / "adapter.gguf", adapter, CONFIG, 0), CONFIG)
        assert {change.scale for change in found.changes.values()} == {1.0}

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ({"general__type": "model"}, "general.type is 'model'"),
            ({"general__type": None}, "general.type is None"),
            ({"adapter__type": "control_vector"}, "adapter.type"),
            ({"general__architecture": "qwen2"}, "general.architecture is 'qwen2'"),
            ({"adapter__lora__alpha": None}, "adapter.lora.alpha must be a number"),
            ({"adapter__lora__alpha": "16"}, "adapter.lora.alpha must be a number"),
            ({"adapter__alora__invocation_tokens": [1, 2]}, "activated LoRA"),
        ],
    )
    def test_a_file_that_is_not_plain_lora(self, tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
        adapter = read_adapter(write_peft(tmp_path / "adapter"), CONFIG)
        path = write_lora_gguf(tmp_path / "adapter.gguf", adapter, CONFIG, 15, **metadata)
        with pytest.raises(CheckpointError, match=message):
            read_adapter(path, CONFIG)

    def test_tensors_that_do_not_fit(self, tmp_path: Path) -> None:
        adapter = read_adapter(write_peft(tmp_path / "adapter"), CONFIG)
        path = write_lora_gguf(tmp_path / "adapter.gguf", adapter, CONFIG, 15)
        for other in ("explicit_head_dim", "narrow_head_dim"):
            with pytest.raises(CheckpointError, match="made for another model"):
                read_adapter(path, VARIANTS[other])

    def test_no_gguf_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"nothing")
        with pytest.raises(CheckpointError):
            read_adapter(tmp_path / "file", CONFIG)


def test_the_digest_tells_adapters_apart(tmp_path: Path) -> None:
    digests = [read_adapter(write_peft(tmp_path / "plain"), CONFIG).digest]
    digests.append(read_adapter(write_peft(tmp_path / "alpha", lora_alpha=7), CONFIG).digest)
    digests.append(read_adapter(write_peft(tmp_path / "stable", use_rslora=True), CONFIG).digest)
    for name in peft_tensors():
        tensors = peft_tensors()
        tensors[name][0, 0] += 1
        digests.append(read_adapter(write_peft(tmp_path / "tensors", tensors), CONFIG).digest)
    moved = {name.replace("layers.0.", "layers.1."): array for name, array in peft_tensors().items()}
    digests.append(read_adapter(write_peft(tmp_path / "moved", moved), CONFIG).digest)
    assert len(set(digests)) == len(digests)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    """One changed or missing byte gives an adapter or a PunaError, nothing else."""
    folder = write_peft(tmp_path / "adapter")
    adapter = read_adapter(folder, CONFIG)
    path = data.draw(st.sampled_from(["adapter_model.safetensors", "adapter_config.json", "adapter.gguf"]))
    write_lora_gguf(folder / "adapter.gguf", adapter, CONFIG, 15)
    content = bytearray((folder / path).read_bytes())
    at = data.draw(st.integers(0, min(len(content) - 1, 900)))
    if data.draw(st.booleans()):
        content[at] = data.draw(st.integers(0, 255))
    else:
        del content[at:]
    (folder / path).write_bytes(content)
    try:
        found = read_adapter(folder / path if path.endswith("gguf") else folder, CONFIG)
    except PunaError:
        return
    for change in found.changes.values():
        assert np.isfinite(change.a).all()
        assert np.isfinite(change.b).all()
