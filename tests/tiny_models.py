"""Tiny random models for every test suite: a configuration, its weights under Hugging Face names, and a Checkpoint."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from puna.config import ModelConfig, RopeScaling
from puna.tensor import Adapter, LowRank, Weight

if TYPE_CHECKING:
    from puna.checkpoint import Checkpoint


def tiny_config(**overrides: Any) -> ModelConfig:
    """A grouped-query model of about 100 thousand parameters; any field of ModelConfig can be overridden."""
    base = ModelConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    return replace(base, **overrides)


LLAMA3_ROPE = RopeScaling("llama3", factor=8.0, original_max_position_embeddings=32)
YARN_ROPE = RopeScaling("yarn", factor=4.0, original_max_position_embeddings=32)

VARIANTS: dict[str, ModelConfig] = {
    "mha": tiny_config(num_key_value_heads=4, rms_norm_eps=1e-6),
    "gqa": tiny_config(),
    "mqa": tiny_config(num_key_value_heads=1),
    "explicit_head_dim": tiny_config(head_dim=32),
    "narrow_head_dim": tiny_config(head_dim=8),
    "tied": tiny_config(tie_word_embeddings=True),
    "attention_bias": tiny_config(attention_bias=True),
    "mlp_bias": tiny_config(mlp_bias=True),
    "both_biases": tiny_config(attention_bias=True, mlp_bias=True),
    "rope_theta_500000": tiny_config(rope_theta=500000.0),
    "rope_linear": tiny_config(rope_scaling=RopeScaling("linear", factor=4.0)),
    "rope_dynamic": tiny_config(
        rope_scaling=RopeScaling("dynamic", factor=4.0),
        max_position_embeddings=32,
    ),
    "rope_llama3": tiny_config(rope_theta=500000.0, rope_scaling=LLAMA3_ROPE),
    "rope_llama3_tied": tiny_config(rope_theta=500000.0, rope_scaling=LLAMA3_ROPE, tie_word_embeddings=True),
    "rope_llama3_published": tiny_config(
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", factor=8.0, original_max_position_embeddings=8192),
        max_position_embeddings=16384,
    ),
    "rope_yarn": tiny_config(rope_scaling=YARN_ROPE),
    "rope_yarn_attention_factor": tiny_config(rope_scaling=replace(YARN_ROPE, attention_factor=1.25)),
}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this configuration has."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for name, shape, bias in (
            ("self_attn.q_proj", (queries, hidden), config.attention_bias),
            ("self_attn.k_proj", (keys, hidden), config.attention_bias),
            ("self_attn.v_proj", (keys, hidden), config.attention_bias),
            ("self_attn.o_proj", (hidden, queries), config.attention_bias),
            ("mlp.gate_proj", (ffn, hidden), config.mlp_bias),
            ("mlp.up_proj", (ffn, hidden), config.mlp_bias),
            ("mlp.down_proj", (hidden, ffn), config.mlp_bias),
        ):
            shapes[f"{prefix}{name}.weight"] = shape
            if bias:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def random_weights(
    config: ModelConfig, seed: int = 0, scale: float = 0.1, weight_type: str = "F32"
) -> dict[str, Weight]:
    """Normal weights of standard deviation ``scale``, norms about 1. Matrices are stored as ``weight_type``."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in tensor_shapes(config).items():
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        if name.endswith("norm.weight"):
            values += np.float32(1)
        weights[name] = Weight.from_array(name, values, weight_type if len(shape) > 1 else "F32")
    return weights


def tiny_checkpoint(config: ModelConfig | None = None, seed: int = 0, weight_type: str = "F32") -> Checkpoint:
    """A random model without a tokenizer, as any file format would be read into."""
    from puna.checkpoint import Checkpoint

    config = config or tiny_config()
    return Checkpoint(config, random_weights(config, seed, weight_type=weight_type))


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_adapter(
    config: ModelConfig, rank: int, seed: int = 0, targets: tuple[str, ...] = TARGETS, size: float = 0.1
) -> Adapter:
    """Changes of standard deviation about ``size``, as large as the weights of ``random_weights``."""
    rng = np.random.default_rng(seed)
    changes = {}
    for name, shape in tensor_shapes(config).items():
        if name.split(".")[-2] in targets and name.endswith(".weight"):
            a = rng.standard_normal((rank, shape[1]), dtype=np.float32)
            b = rng.standard_normal((shape[0], rank), dtype=np.float32)
            changes[name] = LowRank(a, b, size / rank**0.5)
    return Adapter(changes)


def merged(weights: dict[str, Weight], adapter: Adapter) -> dict[str, Weight]:
    """The weights W + scale · B · A, in float32."""
    changed = {}
    for name, weight in weights.items():
        values = weight.dequantize().astype(np.float64)
        if change := adapter.changes.get(name):
            values = values + change.scale * change.b.astype(np.float64) @ change.a.astype(np.float64)
        changed[name] = Weight.from_array(name, values.astype(np.float32))
    return changed
