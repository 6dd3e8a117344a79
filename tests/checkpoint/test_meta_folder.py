"""Meta's folders: shards split the way Meta's tensor-parallel code splits them, and every way a folder can be wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import random_weights, tiny_checkpoint, tiny_config

from puna.checkpoint import Checkpoint, open_checkpoint, save_checkpoint
from puna.checkpoint.meta_pth import MetaFormat
from puna.config import ModelConfig, RopeScaling
from puna.errors import CheckpointError, ConfigError
from puna.tokenizer import load_tokenizer

torch = pytest.importorskip("torch")

CONFIG = tiny_config(num_key_value_heads=4, num_attention_heads=8, head_dim=8, max_position_embeddings=4096)


def meta_state(config: ModelConfig, weights: dict[str, Any]) -> dict[str, Any]:
    """The state dict of Meta's own model code, permuting q and k rows by the formula of Meta's published converter."""

    def interleave(w: Any, heads: int) -> Any:
        # convert_llama_weights_to_hf.py (transformers): view(heads, -1, 2, cols).transpose(1, 2); inverted.
        return w.view(heads, 2, -1, w.shape[-1]).transpose(1, 2).reshape(w.shape)

    t = {name: torch.from_numpy(w.dequantize().copy()) for name, w in weights.items()}
    state = {"tok_embeddings.weight": t["model.embed_tokens.weight"], "norm.weight": t["model.norm.weight"]}
    if "lm_head.weight" in t:
        state["output.weight"] = t["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        hf, meta = f"model.layers.{i}.", f"layers.{i}."
        state[meta + "attention.wq.weight"] = interleave(t[hf + "self_attn.q_proj.weight"], config.num_attention_heads)
        state[meta + "attention.wk.weight"] = interleave(t[hf + "self_attn.k_proj.weight"], config.num_key_value_heads)
        state[meta + "attention.wv.weight"] = t[hf + "self_attn.v_proj.weight"]
        state[meta + "attention.wo.weight"] = t[hf + "self_attn.o_proj.weight"]
        state[meta + "feed_forward.w1.weight"] = t[hf + "mlp.gate_proj.weight"]
        state[meta + "feed_forward.w3.weight"] = t[hf + "mlp.up_proj.weight"]
        state[meta + "feed_forward.w2.weight"] = t[hf + "mlp.down_proj.weight"]
        state[meta + "attention_norm.weight"] = t[hf + "input_layernorm.weight"]
        state[meta + "ffn_norm.weight"] = t[hf + "post_attention_layernorm.weight"]
    state["rope.freqs"] = torch.ones(config.head_dim // 2)
    return state


def write_shards(folder: Path, config: ModelConfig, state: dict[str, Any], count: int, embedding_axis: int = 1) -> None:
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(
        json.dumps(
            {
                "dim": config.hidden_size,
                "n_layers": config.num_hidden_layers,
                "n_heads": config.num_attention_heads,
                "n_kv_heads": config.num_key_value_heads,
                "norm_eps": config.rms_norm_eps,
                "vocab_size": -1,
                "multiple_of": 32,
            }
        )
    )
    for rank in range(count):
        shard = {}
        for name, tensor in state.items():
            if tensor.ndim == 1:
                shard[name] = tensor
            elif name == "tok_embeddings.weight":
                shard[name] = tensor.chunk(count, embedding_axis)[rank]
            else:
                shard[name] = tensor.chunk(count, 1 if ".wo." in name or ".w2." in name else 0)[rank]
            shard[name] = shard[name].clone()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")


def assert_equal_tensors(checkpoint: Checkpoint, weights: dict[str, Any]) -> None:
    assert set(checkpoint.tensors) == set(weights)
    assert len(checkpoint.tensors) == len(weights)
    for name, weight in weights.items():
        found = checkpoint.tensors[name]
        assert found.name == name
        np.testing.assert_array_equal(found.dequantize(), weight.dequantize(), err_msg=name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder of two shards, for tests that break it."""
    write_shards(tmp_path / "m", CONFIG, meta_state(CONFIG, random_weights(CONFIG)), 2)
    return tmp_path / "m"


@pytest.mark.parametrize("embedding_axis", [0, 1], ids=["vocabulary-parallel", "width-parallel"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_join_to_the_whole_model(tmp_path: Path, count: int, embedding_axis: int) -> None:
    weights = random_weights(CONFIG)
    write_shards(tmp_path / "m", CONFIG, meta_state(CONFIG, weights), count, embedding_axis)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config == CONFIG
    assert_equal_tensors(checkpoint, weights)


def test_a_file_of_the_folder_opens_the_whole(folder: Path) -> None:
    assert_equal_tensors(open_checkpoint(folder / "consolidated.01.pth"), random_weights(CONFIG))


def test_a_lone_file_of_another_name(tmp_path: Path) -> None:
    write_shards(tmp_path / "m", CONFIG, meta_state(CONFIG, random_weights(CONFIG)), 1)
    file = (tmp_path / "m" / "consolidated.00.pth").rename(tmp_path / "m" / "model.pt")
    assert_equal_tensors(open_checkpoint(file), random_weights(CONFIG))


@pytest.mark.parametrize("stored", ["absent", "same storage", "equal copy"])
@pytest.mark.parametrize("count", [1, 2])
def test_tied_heads_however_they_are_stored(tmp_path: Path, stored: str, count: int) -> None:
    config = tiny_config(tie_word_embeddings=True, max_position_embeddings=4096)
    weights = random_weights(config)
    state = meta_state(config, weights)
    if stored != "absent":
        state["output.weight"] = state["tok_embeddings.weight"]
    write_shards(tmp_path / "m", config, state, count, embedding_axis=0)
    if stored == "same storage":
        for file in (tmp_path / "m").glob("*.pth"):
            shard = torch.load(file)
            torch.save(shard | {"output.weight": shard["tok_embeddings.weight"]}, file)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config == config
    assert_equal_tensors(checkpoint, weights)


def test_torch_loads_a_written_folder_as_metas_state_dict(tmp_path: Path) -> None:
    for name, config in (("untied", CONFIG), ("tied", tiny_config(tie_word_embeddings=True))):
        checkpoint = tiny_checkpoint(config)
        save_checkpoint(checkpoint, tmp_path / name, "meta")
        loaded = torch.load(tmp_path / name / "consolidated.00.pth", weights_only=True)
        expected = meta_state(config, dict(checkpoint.tensors))
        del expected["rope.freqs"]
        expected.setdefault("output.weight", expected["tok_embeddings.weight"])
        assert set(loaded) == set(expected)
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("inner", [96, 100, 171, 172, 11008, 14336, 28672, 53248])
@pytest.mark.parametrize("hidden", [64, 4096, 16384])
def test_params_give_metas_code_the_right_inner_size(hidden: int, inner: int) -> None:
    params = tiny_config(hidden_size=hidden, intermediate_size=inner).to_meta()
    # FeedForward.__init__ of Meta's llama/model.py
    size = int(2 * (4 * params["dim"]) / 3)
    size = int(params["ffn_dim_multiplier"] * size)
    assert params["multiple_of"] * ((size + params["multiple_of"] - 1) // params["multiple_of"]) == inner


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    for config, message in (
        (tiny_config(attention_bias=True), "biases"),
        (tiny_config(mlp_bias=True), "biases"),
        (tiny_config(rope_scaling=RopeScaling("linear", factor=2.0)), "type linear"),
        (tiny_config(rope_scaling=RopeScaling("llama3", 8.0, original_max_position_embeddings=4096)), "8192"),
    ):
        with pytest.raises(ConfigError, match=message):
            save_checkpoint(tiny_checkpoint(config), tmp_path / "m", "meta")
    with pytest.raises(CheckpointError, match="not Q8_0"):
        save_checkpoint(tiny_checkpoint(), tmp_path / "m", "meta", "Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_quantized_weights_become_f16_and_bf16_is_kept(tmp_path: Path) -> None:
    for given, expected in (("Q8_0", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)):
        save_checkpoint(tiny_checkpoint(weight_type=given), tmp_path / given, "meta")
        loaded = torch.load(tmp_path / given / "consolidated.00.pth", weights_only=True)
        assert loaded["layers.1.feed_forward.w2.weight"].dtype == expected
        assert loaded["norm.weight"].dtype == torch.float32


def test_tokenizer_beside_or_above(folder: Path, shared_data: Path) -> None:
    model = shared_data / "tokenizers" / "sentencepiece.model"
    assert open_checkpoint(folder).tokenizer is None
    shutil.copy(model, folder.parent / "tokenizer.model")
    above = open_checkpoint(folder).tokenizer
    assert above is not None
    shutil.copy(model, folder / "tokenizer.model")
    beside = open_checkpoint(folder).tokenizer
    assert beside is not None
    assert above.encode("Hello world") == beside.encode("Hello world")


def test_a_vocabulary_that_tokenizer_model_cannot_express_stays_with_the_weights(
    tmp_path: Path, smollm2_path: Path
) -> None:
    tokenizer = load_tokenizer(smollm2_path)
    assert tokenizer.to_tokenizer_model() is None
    checkpoint = replace(tiny_checkpoint(), read_tokenizer=lambda: tokenizer)
    save_checkpoint(checkpoint, tmp_path / "meta", "meta")
    again = open_checkpoint(tmp_path / "meta").tokenizer
    assert again is not None
    text = "Hello  world, 2024 😀"
    assert again.encode(text) == tokenizer.encode(text)
    assert (again.bos_id, again.eos_id, again.add_bos) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos)
    assert again.special_tokens == tokenizer.special_tokens


def test_an_ordinary_token_of_another_vocabulary_ends_nothing(tmp_path: Path, shared_data: Path) -> None:
    """Once, id 2 ended an answer in every Meta folder, though only Llama 1 and 2 have their end token there."""
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "tiktoken_small.model")
    config = tiny_config(vocab_size=tokenizer.vocab_size)
    checkpoint = replace(tiny_checkpoint(config), read_tokenizer=lambda: tokenizer)
    save_checkpoint(checkpoint, tmp_path / "meta", "meta")
    found = open_checkpoint(tmp_path / "meta").config
    assert (found.bos_token_id, found.eos_token_ids) == (2000, (2001,))


# --- folders that are wrong -------------------------------------------------------------------------------------------


def edit_params(folder: Path, **changes: object) -> None:
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_shard(folder: Path, rank: int, edit: Any) -> None:
    path = folder / f"consolidated.{rank:02d}.pth"
    state = torch.load(path)
    edit(state)
    torch.save(state, path)


def test_missing_params(folder: Path) -> None:
    (folder / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"params\.json is missing"):
        open_checkpoint(folder)


def test_missing_shard(folder: Path) -> None:
    (folder / "consolidated.00.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(CheckpointError, match=r"expected consolidated\.00\.pth, found consolidated\.01\.pth"):
        open_checkpoint(folder)


def test_only_half_of_the_shards(folder: Path) -> None:
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(CheckpointError, match=r"has shape .* calls for"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "lacks dim"),
        ({"dim": "64"}, "dim must be a whole number"),
        ({"dim": 128}, r"shape|head"),
        ({"n_layers": 3}, r"layers\.2\.\S+ of shape \(64,\) is missing"),
        ({"n_layers": 1}, r"layers\.1\.\S+ has no place"),
        ({"n_layers": 2**31 - 1}, "2147483647 layers"),
        ({"n_heads": 0}, "head"),
        ({"n_kv_heads": 3}, "multiple of"),
        ({"n_kv_heads": 8}, r"k_proj\.weight has shape \(32, 64\)"),
        ({"vocab_size": 32000}, "vocab_size 32000"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope must be true or false"),
    ],
)
def test_params_that_contradict_the_tensors(folder: Path, changes: dict, message: str) -> None:
    edit_params(folder, **changes)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        open_checkpoint(folder)


def test_params_that_are_no_json(folder: Path) -> None:
    for text in ("{", "[]", "[" * 100_000, "\udcff"):
        (folder / "params.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=r"params\.json"):
            open_checkpoint(folder)


def test_shards_that_do_not_fit_together(folder: Path) -> None:
    edit_shard(folder, 1, lambda s: s.update({"layers.0.attention.wq.weight": torch.zeros(3, 64)}))
    with pytest.raises(
        CheckpointError, match=r"wq\.weight has shape \(3, 64\), in consolidated\.00\.pth it has \(32, 64\)"
    ):
        open_checkpoint(folder)
    edit_shard(folder, 1, lambda s: s.pop("layers.0.attention.wq.weight"))
    with pytest.raises(CheckpointError, match="holds other tensors"):
        open_checkpoint(folder)


def test_shards_of_different_types(folder: Path) -> None:
    edit_shard(folder, 1, lambda s: s.update({"output.weight": s["output.weight"].half()}))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="different types"):
        checkpoint.tensors["lm_head.weight"]


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.feed_forward.w1.weight", "norm.weight"])
def test_missing_tensors_are_named(folder: Path, name: str) -> None:
    for rank in range(2):
        edit_shard(folder, rank, lambda s: s.pop(name))
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "output.weight", "layers.0.feed_forward.w1.weight"])
def test_vectors_in_the_place_of_matrices(folder: Path, name: str) -> None:
    for rank in range(2):
        edit_shard(folder, rank, lambda s: s.update({name: torch.zeros(256)}))
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)


def test_unknown_tensors_are_named(folder: Path) -> None:
    for rank in range(2):
        edit_shard(folder, rank, lambda s: s.update({"layers.0.attention.q_norm.weight": torch.zeros(8)}))
    with pytest.raises(CheckpointError, match="q_norm"):
        open_checkpoint(folder)


def test_matches_only_metas_files(tmp_path: Path, folder: Path) -> None:
    assert MetaFormat().matches(folder)
    assert not MetaFormat().matches(tmp_path)
    (tmp_path / "x.gguf").touch()
    assert not MetaFormat().matches(tmp_path / "x.gguf")
