"""Names against the gguf package's table and Meta's released files; rotary row order against its definition."""

from dataclasses import replace

import numpy as np
import pytest

from puna.checkpoint import names
from puna.config import ModelConfig
from puna.errors import CheckpointError
from puna.tensor import Weight

CONFIG = ModelConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    attention_bias=True,
    mlp_bias=True,
)


def test_gguf_names_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)
    for name in names.hf_names(CONFIG):
        assert names.gguf_name(name) == table.get_name(name, try_suffixes=(".weight", ".bias"))


@pytest.mark.parametrize(
    ("hf", "meta"),
    [
        ("model.embed_tokens.weight", "tok_embeddings.weight"),
        ("model.norm.weight", "norm.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.layers.10.input_layernorm.weight", "layers.10.attention_norm.weight"),
        ("model.layers.10.post_attention_layernorm.weight", "layers.10.ffn_norm.weight"),
        ("model.layers.0.self_attn.q_proj.weight", "layers.0.attention.wq.weight"),
        ("model.layers.0.self_attn.k_proj.weight", "layers.0.attention.wk.weight"),
        ("model.layers.0.self_attn.v_proj.weight", "layers.0.attention.wv.weight"),
        ("model.layers.0.self_attn.o_proj.weight", "layers.0.attention.wo.weight"),
        ("model.layers.7.mlp.gate_proj.weight", "layers.7.feed_forward.w1.weight"),
        ("model.layers.7.mlp.down_proj.weight", "layers.7.feed_forward.w2.weight"),
        ("model.layers.7.mlp.up_proj.weight", "layers.7.feed_forward.w3.weight"),
    ],
)
def test_meta_names(hf: str, meta: str) -> None:
    assert names.meta_name(hf) == meta
    assert names.hf_name_from_meta(meta) == hf


def test_every_name_returns() -> None:
    for name in names.hf_names(CONFIG):
        assert names.hf_name_from_gguf(names.gguf_name(name)) == name
        assert names.hf_name_from_meta(names.meta_name(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "rope_freqs.weight",
        "blk.1.attn_q",
        "blk.x.attn_q.weight",
        "blk.01.attn_q.weight",
        "blk.1.attn_q_norm.weight",
        "blk..attn_q.weight",
        "token_embd.0.weight",
        "blk.1.output.weight",
        "blk.#.attn_q.weight",
        "attn_q.weight",
        "blk.1.2.attn_q.weight",
        "xblk.1.attn_q.weight",
        "blk.1.attn_q.scale",
        "blk.-1.attn_q.weight",
        "blk.1.attn_q.weight.weight",
        ".weight",
        "weight",
    ],
)
def test_unknown_names_are_none(name: str) -> None:
    assert names.hf_name_from_gguf(name) is None


def test_an_unknown_hugging_face_name_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_norm\.weight"):
        names.gguf_name("model.layers.0.self_attn.q_norm.weight")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_shapes_are_those_of_transformers(tied: bool, bias: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(CONFIG, num_hidden_layers=2, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf()))
    theirs = {name: tuple(t.shape) for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert names.hf_names(config) == theirs


def test_interleaved_rows_pair_neighbours() -> None:
    # Two heads of eight numbers. Half-split: pair i of a head is rows i and i + 4. Interleaved: rows 2i and 2i + 1.
    assert names.interleaved_order(2, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert names.half_split_order(2, 8).tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]


@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
@pytest.mark.parametrize(("stem", "heads"), [("q_proj", 4), ("k_proj", 2)])
def test_rotary_rows_move_unchanged_and_return(stem: str, heads: int, type_name: str) -> None:
    values = np.random.default_rng(0).standard_normal((heads * 8, 32)).astype(np.float32)
    weight = Weight.from_array(f"model.layers.0.self_attn.{stem}.weight", values, type_name)
    moved = names.to_interleaved(weight, CONFIG)
    # The definition that Hugging Face's conversion script uses, written on the decoded matrix.
    wanted = weight.dequantize().reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(heads * 8, 32)
    np.testing.assert_array_equal(moved.dequantize(), wanted)
    np.testing.assert_array_equal(names.to_half_split(moved, CONFIG).data, weight.data)


def test_rotary_biases_move_with_their_rows() -> None:
    bias = Weight.from_array("model.layers.0.self_attn.k_proj.bias", np.arange(16, dtype=np.float32), "BF16")
    moved = names.to_interleaved(bias, CONFIG)
    np.testing.assert_array_equal(moved.dequantize(), names.interleaved_order(2, 8))
    np.testing.assert_array_equal(names.to_half_split(moved, CONFIG).data, bias.data)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.v_proj.weight", "model.embed_tokens.weight"])
def test_other_weights_stay(name: str) -> None:
    weight = Weight.from_array(name, np.zeros((16, 4), np.float32))
    assert names.to_half_split(weight, CONFIG) is weight
    assert names.to_interleaved(weight, CONFIG) is weight


class TestCheckTensors:
    def test_accepts_what_is_expected(self) -> None:
        names.check_tensors(CONFIG, names.hf_names(CONFIG), "m.gguf")

    def test_names_a_missing_tensor(self) -> None:
        found = names.hf_names(CONFIG)
        del found["model.norm.weight"]
        with pytest.raises(CheckpointError, match=r"m\.gguf: tensor model\.norm\.weight of shape \(24,\) is missing"):
            names.check_tensors(CONFIG, found, "m.gguf")

    def test_names_both_shapes(self) -> None:
        found = names.hf_names(CONFIG) | {"model.layers.3.self_attn.k_proj.weight": (32, 24)}
        with pytest.raises(CheckpointError, match=r"k_proj\.weight has shape \(32, 24\), .* calls for \(16, 24\)"):
            names.check_tensors(CONFIG, found, "m.gguf")

    def test_names_an_unexpected_tensor(self) -> None:
        found = names.hf_names(CONFIG) | {"model.layers.12.mlp.up_proj.weight": (32, 24)}
        with pytest.raises(CheckpointError, match=r"model\.layers\.12\.mlp\.up_proj\.weight has no place .* 12 layers"):
            names.check_tensors(CONFIG, found, "m.gguf")
