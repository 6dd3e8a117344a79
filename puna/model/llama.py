"""The Llama Transformer, written once: Llama 1 to 3.3 and every model that shares the architecture.

Sources: Touvron et al. 2023 (RMSNorm, SwiGLU, rotary positions), Ainslie et al. 2023 (grouped-query attention).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from puna.config import ModelConfig
from puna.model.rope import inverse_frequencies
from puna.ops.protocol import Array, Batch, KVCache, Ops, UploadedWeight


@dataclass(frozen=True)
class Block:
    """The weights of one layer; a bias is None where the model has none."""

    attention_norm: UploadedWeight
    q: UploadedWeight
    k: UploadedWeight
    v: UploadedWeight
    o: UploadedWeight
    mlp_norm: UploadedWeight
    gate: UploadedWeight
    up: UploadedWeight
    down: UploadedWeight
    q_bias: UploadedWeight | None
    k_bias: UploadedWeight | None
    v_bias: UploadedWeight | None
    o_bias: UploadedWeight | None
    gate_bias: UploadedWeight | None
    up_bias: UploadedWeight | None
    down_bias: UploadedWeight | None


@dataclass(frozen=True)
class Weights:
    """All weights, bound to their places; ``head`` is the embedding itself where they are tied."""

    embedding: UploadedWeight
    blocks: tuple[Block, ...]
    norm: UploadedWeight
    head: UploadedWeight


def bind(config: ModelConfig, tensors: Mapping[str, UploadedWeight]) -> Weights:
    """Sort uploaded tensors (Hugging Face names) into the model's places."""
    embedding = tensors["model.embed_tokens.weight"]
    return Weights(
        embedding=embedding,
        blocks=tuple(bind_block(tensors, layer) for layer in range(config.num_hidden_layers)),
        norm=tensors["model.norm.weight"],
        head=embedding if config.tie_word_embeddings else tensors["lm_head.weight"],
    )


def bind_block(tensors: Mapping[str, UploadedWeight], layer: int) -> Block:
    """Those of one layer; the others may be missing."""
    prefix = f"model.layers.{layer}."
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    return Block(
        attention_norm=tensors[prefix + "input_layernorm.weight"],
        q=tensors[attention + "q_proj.weight"],
        k=tensors[attention + "k_proj.weight"],
        v=tensors[attention + "v_proj.weight"],
        o=tensors[attention + "o_proj.weight"],
        mlp_norm=tensors[prefix + "post_attention_layernorm.weight"],
        gate=tensors[mlp + "gate_proj.weight"],
        up=tensors[mlp + "up_proj.weight"],
        down=tensors[mlp + "down_proj.weight"],
        q_bias=tensors.get(attention + "q_proj.bias"),
        k_bias=tensors.get(attention + "k_proj.bias"),
        v_bias=tensors.get(attention + "v_proj.bias"),
        o_bias=tensors.get(attention + "o_proj.bias"),
        gate_bias=tensors.get(mlp + "gate_proj.bias"),
        up_bias=tensors.get(mlp + "up_proj.bias"),
        down_bias=tensors.get(mlp + "down_proj.bias"),
    )


def run_block(
    ops: Ops, config: ModelConfig, w: Block, x: Array, angles: Array, layer: int, batch: Batch, kv: KVCache
) -> Array:
    """One layer: hidden states [T, D] -> [T, D]; its keys and values are written to the cache."""
    h = ops.rms_norm(x, w.attention_norm, config.rms_norm_eps)
    q, k, v = ops.linears(h, (w.q, w.k, w.v), (w.q_bias, w.k_bias, w.v_bias))
    h = ops.attend(ops.rope(q, angles), ops.rope(k, angles), v, kv, layer, batch)
    x = ops.linear(h, w.o, w.o_bias, residual=x)
    h = ops.rms_norm(x, w.mlp_norm, config.rms_norm_eps)
    gate, up = ops.linears(h, (w.gate, w.up), (w.gate_bias, w.up_bias))
    return ops.linear(ops.swiglu(gate, up), w.down, w.down_bias, residual=x)


def forward(ops: Ops, config: ModelConfig, weights: Weights, batch: Batch, kv: KVCache) -> Array:
    """Logits [R, V] of the rows the batch asks for; the step's keys and values are written to the cache."""
    x = hidden(ops, config, weights, batch, kv)
    return ops.linear(ops.rows(x, batch.logit_rows), weights.head)


def hidden(
    ops: Ops,
    config: ModelConfig,
    weights: Weights,
    batch: Batch,
    kv: KVCache,
    layer_call: Callable[..., Array] = run_block,
) -> Array:
    """The normalised hidden state of every token, [T, D]: what the head reads.

    ``layer_call`` is called in place of ``run_block``, which it calls: to compute a layer again in the backward pass,
    or to gather its weights before.
    """
    frequencies, scale = inverse_frequencies(config, batch)
    angles = ops.rope_angles(batch.positions, frequencies, scale)
    x = ops.embed(weights.embedding, batch.tokens)
    for layer, block in enumerate(weights.blocks):
        x = layer_call(ops, config, block, x, angles, layer, batch, kv)
    return ops.rms_norm(x, weights.norm, config.rms_norm_eps)
