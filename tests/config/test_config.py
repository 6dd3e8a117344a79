"""ModelConfig in each file format's spelling, against transformers, published files, and values that make no sense."""

import json
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VARIANTS, tiny_config

from puna.config import ModelConfig, RopeScaling, llama3_factors
from puna.errors import ConfigError

transformers = pytest.importorskip("transformers")

LLAMA3 = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192)
MINIMAL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def hf(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(MINIMAL | changes)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_hf_round_trip(name: str) -> None:
    assert ModelConfig.from_hf(json.loads(json.dumps(VARIANTS[name].to_hf()))) == VARIANTS[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_spelling_comes_back_equal(name: str) -> None:
    """transformers 5 reads our (version 4) spelling and writes its own."""
    written = transformers.LlamaConfig(**VARIANTS[name].to_hf()).to_dict()
    assert "rope_parameters" in written
    assert "rope_theta" not in written
    assert ModelConfig.from_hf(written) == VARIANTS[name]


def test_defaults_of_old_files_are_those_of_transformers() -> None:
    """config.json of Llama 1 conversions has no num_key_value_heads, rope_theta, head_dim or biases."""
    given = {k: v for k, v in MINIMAL.items() if k != "max_position_embeddings"}
    theirs = transformers.LlamaConfig(**given)
    ours = ModelConfig.from_hf(given)
    assert ours.num_key_value_heads == theirs.num_key_value_heads == 4
    assert ours.head_dim == theirs.head_dim == 16
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.attention_bias == theirs.attention_bias
    assert ours.mlp_bias == theirs.mlp_bias
    assert ours.rope_scaling is None


V4_AND_V5 = [
    ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None),
    (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        RopeScaling("linear", factor=2.0),
    ),
    (
        {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}},
        RopeScaling("dynamic", factor=2.0),
    ),
    (
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": None}},
        {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 4096, "rope_theta": 5e5,
                             "factor": 2.0}},
        RopeScaling("yarn", factor=2.0, original_max_position_embeddings=4096),
    ),
    (
        {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 1024}},
        {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 1024, "rope_theta": 5e5,
                             "factor": None}},
        RopeScaling("yarn", factor=4.0, original_max_position_embeddings=1024),
    ),
    (
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                             "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192, "rope_theta": 5e5}},
        LLAMA3,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("v4", "v5", "expected"), V4_AND_V5)
def test_both_spellings_of_rope(v4: dict, v5: dict, expected: RopeScaling | None) -> None:
    for spelling in (v4, v5):
        config = hf(**spelling)
        assert config.rope_theta == 500000.0
        assert config.rope_scaling == expected


def test_end_tokens() -> None:
    assert hf(eos_token_id=2).eos_token_ids == (2,)
    assert hf(eos_token_id=[128001, 128008, 128009, 128001]).eos_token_ids == (128001, 128008, 128009)
    assert hf(eos_token_id=None).eos_token_ids == ()
    assert hf(pad_token_id=-1).pad_token_id is None  # as Llama 1 and 2 files have it
    assert hf(pad_token_id=0).pad_token_id == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"vocab_size": 0}, "vocab_size must be a positive"),
        ({"vocab_size": True}, "vocab_size must be a whole number"),
        ({"vocab_size": 1.5}, "vocab_size must be a whole number"),
        ({"vocab_size": 2**31}, "vocab_size must be a whole number below"),
        ({"vocab_size": 10**5000}, "vocab_size must be a whole number below"),
        ({"hidden_size": -64}, "hidden_size|head_dim"),
        ({"num_attention_heads": 0}, "head"),
        ({"num_attention_heads": 3}, "lacks head_dim"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": math.inf}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": [1]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "su"}}, "'su' is not supported; known: linear"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks original_max_position_embeddings"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192,
                              "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
            "low_freq_factor < high_freq_factor",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": math.nan}}, "beta_fast"),
        ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}}, "original_max|factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attention_bias": "false"}, "attention_bias must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": "</s>"}, "token id"),
        ({"eos_token_id": [[2]]}, "token id"),
        ({"bos_token_id": 2**40}, "token id"),
    ],
)  # fmt: skip
def test_impossible_hf_values_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf(**changes)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
ROPE_KEYS = ("rope_type", "type", "factor", "original_max_position_embeddings", "low_freq_factor", "attention_factor",
             "high_freq_factor", "beta_fast", "beta_slow", "truncate", "rope_theta", "mscale")  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from([*tiny_config().to_hf(), "rope_parameters"]), ANYTHING, max_size=3),
    rope=st.dictionaries(
        st.sampled_from(ROPE_KEYS), ANYTHING | st.sampled_from(["yarn", "llama3", "linear", "dynamic"]), max_size=6
    ),
)
def test_any_json_gives_a_config_or_a_clear_error(fields: dict, rope: dict) -> None:
    with suppress(ConfigError):
        config = hf(**({"rope_scaling": rope} | fields))
        assert ModelConfig.from_hf(config.to_hf()) == config


# --- GGUF -------------------------------------------------------------------------------------------------------------


def from_gguf(metadata: dict, config: ModelConfig) -> ModelConfig:
    scaling = config.rope_scaling
    factors: tuple[float, ...] = ()
    if scaling is not None and scaling.rope_type == "llama3":
        factors = tuple(np.float32(llama3_factors(scaling, config.rope_theta, config.head_dim)).tolist())
    ids = {"tokenizer.ggml.bos_token_id": config.bos_token_id, "tokenizer.ggml.eos_token_id": config.eos_token_ids[0]}
    return ModelConfig.from_gguf(
        metadata | ids,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        rope_factors=factors,
    )


def as_float32(metadata: dict) -> dict:
    return {k: float(np.float32(v)) if isinstance(v, float) else v for k, v in metadata.items()}


@pytest.mark.parametrize("name", set(VARIANTS) - {"rope_dynamic", "rope_yarn_attention_factor", "rope_llama3",
                                                  "rope_llama3_tied"})  # fmt: skip
def test_gguf_round_trip_through_float32(name: str) -> None:
    assert from_gguf(as_float32(VARIANTS[name].to_gguf()), VARIANTS[name]) == VARIANTS[name]


def test_gguf_keeps_unpublished_llama3_scaling_as_its_divisors() -> None:
    config = VARIANTS["rope_llama3"]
    found = from_gguf(config.to_gguf(), config)
    assert found.rope_scaling is not None
    assert found.rope_scaling.rope_type == "factors"
    assert config.rope_scaling is not None
    np.testing.assert_allclose(
        found.rope_scaling.factors, llama3_factors(config.rope_scaling, config.rope_theta, config.head_dim), rtol=1e-6
    )


@pytest.mark.parametrize(("theta", "head_dim", "factor"), [(500000.0, 128, 8.0), (500000.0, 64, 32.0)])
def test_published_scalings_are_recognised(theta: float, head_dim: int, factor: float) -> None:
    config = tiny_config(rope_theta=theta, head_dim=head_dim, rope_scaling=replace(LLAMA3, factor=factor))
    assert from_gguf(config.to_gguf(), config).rope_scaling == config.rope_scaling


@pytest.mark.parametrize("name", ["rope_dynamic", "rope_yarn_attention_factor"])
def test_what_gguf_cannot_say(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be written to GGUF; write safetensors instead"):
        VARIANTS[name].to_gguf()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture 'qwen2'"),
        ({"general.architecture": None}, "general.architecture None"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.attention.head_count": [4, 4]}, "head_count must be a whole number"),
        ({"llama.block_count": None}, "lacks llama.block_count"),
        ({"llama.block_count": 2**40}, "block_count"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8, expected the head dimension 16"),
        ({"llama.attention.value_length": 8}, "value_length is 8"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "lacks llama.attention.layer_norm_rms_epsilon"),
        ({"llama.attention.layer_norm_rms_epsilon": 1e300}, "epsilon"),
        ({"llama.rope.freq_base": math.nan}, "freq_base"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type 'longrope'"),
        ({"llama.rope.scaling.type": "yarn"}, "factor"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
             "llama.rope.scaling.attn_factor": 0.5},
            "attn_factor",
        ),
        ({"llama.vocab_size": None, "tokenizer.ggml.tokens": []}, "lacks llama.vocab_size"),
        ({"tokenizer.ggml.tokens": 3}, "tokenizer.ggml.tokens must be an array, found 3"),
        ({"tokenizer.ggml.eot_token_id": "x"}, "token id"),
    ],
)  # fmt: skip
def test_impossible_gguf_values_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_gguf(tiny_config().to_gguf() | changes, tiny_config())


def test_gguf_vocabulary_size_from_its_tokens() -> None:
    metadata = tiny_config().to_gguf() | {"tokenizer.ggml.tokens": ["x"] * 77}
    del metadata["llama.vocab_size"]
    assert from_gguf(metadata, tiny_config()).vocab_size == 77


def test_old_linear_scaling_key() -> None:
    metadata = tiny_config().to_gguf() | {"llama.rope.scale_linear": 4.0}
    assert from_gguf(metadata, tiny_config()).rope_scaling == RopeScaling("linear", factor=4.0)


# --- Meta -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["mha", "gqa", "mqa", "explicit_head_dim", "narrow_head_dim", "tied", "rope_theta_500000", "rope_llama3_published"],
)
def test_meta_round_trip(name: str) -> None:
    config = VARIANTS[name]
    params = json.loads(json.dumps(config.to_meta()))
    found = ModelConfig.from_meta(params, vocab_size=256, intermediate_size=96)
    assert replace(found, tie_word_embeddings=config.tie_word_embeddings) == config


# params.json as Meta published them, and what the model cards say of the model.
PUBLISHED = {
    "llama-7b": (
        {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1},
        (32000, 11008), {"max_position_embeddings": 2048, "rope_theta": 10000.0, "num_key_value_heads": 32},
    ),
    "llama-65b": (
        {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
        (32000, 22016), {"max_position_embeddings": 2048, "rms_norm_eps": 1e-05},
    ),
    "llama-2-70b": (
        {"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
         "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1},
        (32000, 28672), {"max_position_embeddings": 4096, "num_key_value_heads": 8, "eos_token_ids": (2,)},
    ),
    "codellama-7b": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "norm_eps": 1e-05, "rope_theta": 1000000,
         "vocab_size": -1},
        (32016, 11008), {"max_position_embeddings": 16384, "rope_theta": 1e6},
    ),
    "llama-3-8b": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
         "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0},
        (128256, 14336), {"max_position_embeddings": 8192, "rope_scaling": None, "bos_token_id": 128000},
    ),
    "llama-3.1-8b": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
         "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
        (128256, 14336), {"max_position_embeddings": 131072, "rope_scaling": LLAMA3,
                          "eos_token_ids": (128001, 128008, 128009)},
    ),
    "llama-3.2-1b": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 256,
         "ffn_dim_multiplier": 1.5, "norm_eps": 1e-05, "rope_theta": 500000.0, "use_scaled_rope": True},
        (128256, 8192), {"max_position_embeddings": 131072, "rope_scaling": replace(LLAMA3, factor=32.0),
                         "head_dim": 64},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_params(name: str) -> None:
    params, (vocab, inner), expected = PUBLISHED[name]
    config = ModelConfig.from_meta(params, vocab_size=vocab, intermediate_size=inner)
    for field, value in expected.items():
        assert getattr(config, field) == value
    # Written again, there is no key that Meta's own loaders do not know.
    assert set(config.to_meta()) <= set(params) | {"n_kv_heads", "ffn_dim_multiplier"}
    assert ModelConfig.from_meta(config.to_meta(), vocab_size=vocab, intermediate_size=inner) == config


# --- RoPE and construction --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("theta", "head_dim", "factor"), [(500000.0, 128, 8.0), (500000.0, 64, 32.0), (1e4, 16, 4.0)])
def test_llama3_factors_equal_those_of_transformers(theta: float, head_dim: int, factor: float) -> None:
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    config = tiny_config(rope_theta=theta, head_dim=head_dim, rope_scaling=replace(LLAMA3, factor=factor))
    inverse, _ = rope.ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**config.to_hf()), "cpu")
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    assert config.rope_scaling is not None
    ours = plain / np.array(llama3_factors(config.rope_scaling, theta, head_dim))
    np.testing.assert_allclose(ours, inverse.numpy(), rtol=2e-6)


def test_factors_fit_the_head() -> None:
    with pytest.raises(ConfigError, match=r"7 factors, expected head_dim / 2 = 8"):
        tiny_config(rope_scaling=RopeScaling("factors", factors=(1.0,) * 7))
    with pytest.raises(ConfigError, match="positive numbers"):
        RopeScaling("factors", factors=(1.0, math.nan))
    with pytest.raises(ConfigError, match="cannot be written to a Hugging Face config; write GGUF"):
        tiny_config(rope_scaling=RopeScaling("factors", factors=(1.0,) * 8)).to_hf()
