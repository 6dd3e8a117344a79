"""The tensors of a Llama model: their names in each format, their shapes, and the row order of rotary queries and keys.

Hugging Face's names are the ones used past the checkpoint layer. Sources: transformers' ``modeling_llama.py``, the GGUF
specification ("Standardized tensor names"), Meta's ``llama-models``.

Rotary positions turn pairs of numbers. Meta and GGUF (architecture ``llama``) keep the two of a pair in neighbouring
rows of a head (interleaved); Hugging Face keeps them half a head apart (half-split). The rows are otherwise the same,
so converting is a reordering that leaves quantized rows untouched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from puna.config import ModelConfig
from puna.errors import CheckpointError
from puna.tensor import DeferredWeight, Weight
from puna.tensor.mapped import drop_mapped_pages

# Hugging Face, GGUF, Meta; without the ending ".weight" or ".bias".
_OUTER = (
    ("model.embed_tokens", "token_embd", "tok_embeddings"),
    ("model.norm", "output_norm", "norm"),
    ("lm_head", "output", "output"),
)
_LAYER = (
    ("input_layernorm", "attn_norm", "attention_norm"),
    ("self_attn.q_proj", "attn_q", "attention.wq"),
    ("self_attn.k_proj", "attn_k", "attention.wk"),
    ("self_attn.v_proj", "attn_v", "attention.wv"),
    ("self_attn.o_proj", "attn_output", "attention.wo"),
    ("post_attention_layernorm", "ffn_norm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate", "feed_forward.w1"),
    ("mlp.up_proj", "ffn_up", "feed_forward.w3"),
    ("mlp.down_proj", "ffn_down", "feed_forward.w2"),
)
_HF, _GGUF, _META = range(3)
_LAYER_PREFIX = ("model.layers", "blk", "layers")


def gguf_name(hf: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``. Raises CheckpointError for an unknown name."""
    return _known(_translate(hf, _HF, _GGUF), hf)


def meta_name(hf: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``layers.3.feed_forward.w3.weight``. Raises CheckpointError."""
    return _known(_translate(hf, _HF, _META), hf)


def hf_name_from_gguf(name: str) -> str | None:
    """``blk.3.ffn_up.weight`` -> ``model.layers.3.mlp.up_proj.weight``; None for a name that is not one of ours."""
    return _translate(name, _GGUF, _HF)


def hf_name_from_meta(name: str) -> str | None:
    """``layers.3.feed_forward.w3.weight`` -> ``model.layers.3.mlp.up_proj.weight``; None for an unknown name."""
    return _translate(name, _META, _HF)


def hf_names(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model with its shape (outputs, inputs), in the order of use; no head when it is tied."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    matrices = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        for stem, *_ in _LAYER:
            name = f"model.layers.{layer}.{stem}"
            shape = matrices.get(stem, (hidden,))
            shapes[f"{name}.weight"] = shape
            if (config.attention_bias and stem.startswith("self_attn")) or (config.mlp_bias and stem.startswith("mlp")):
                shapes[f"{name}.bias"] = shape[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def check_tensors(config: ModelConfig, found: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise CheckpointError unless ``found`` (Hugging Face name -> shape) is exactly what the config calls for.

    ``source`` names the file or folder in the message.
    """
    # Checked first: a hostile configuration may claim more layers than fit in memory as a list of names.
    if config.num_hidden_layers > len(found):
        raise CheckpointError(
            f"{source}: {len(found)} tensors are too few for a model of {config.num_hidden_layers} layers; "
            "the file is incomplete"
        )
    expected = hf_names(config)
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{source}: tensor {name} of shape {shape} is missing; the file is incomplete")
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{source}: tensor {name} has shape {tuple(found[name])}, but its configuration calls for {shape}"
            )
    for name in found:
        if name not in expected:
            raise CheckpointError(
                f"{source}: tensor {name} has no place in a Llama model of {config.num_hidden_layers} layers; "
                "the file holds another architecture than its configuration says"
            )


def half_split_order(heads: int, head_dim: int) -> NDArray[np.intp]:
    """Row indices to take from an interleaved tensor to get the half-split one: intp[heads * head_dim]."""
    rows: NDArray[np.intp] = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    return rows


def interleaved_order(heads: int, head_dim: int) -> NDArray[np.intp]:
    """Row indices to take from a half-split tensor to get the interleaved one: intp[heads * head_dim]."""
    rows: NDArray[np.intp] = np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    return rows


def rotary_heads(config: ModelConfig, hf: str) -> int | None:
    """How many heads the rows of this tensor make up, if it is a query or key projection's weight or bias."""
    if ".self_attn.q_proj." in hf:
        return config.num_attention_heads
    if ".self_attn.k_proj." in hf:
        return config.num_key_value_heads
    return None


def to_half_split(weight: Weight, config: ModelConfig) -> Weight:
    """A weight under its Hugging Face name, from Meta's and GGUF's row order to Hugging Face's; most need no change."""
    heads = rotary_heads(config, weight.name)
    return weight if heads is None else _in_order(weight, half_split_order(heads, config.head_dim))


def to_interleaved(weight: Weight, config: ModelConfig) -> Weight:
    """The inverse of to_half_split."""
    heads = rotary_heads(config, weight.name)
    return weight if heads is None else _in_order(weight, interleaved_order(heads, config.head_dim))


def _in_order(weight: Weight, order: NDArray[np.intp]) -> Weight:
    """A copy, made when it is needed; so a file's pages need not stay in memory too."""

    def reordered() -> NDArray[np.uint8]:
        data = weight.take_rows(order).data
        drop_mapped_pages(weight.data)
        return data

    return DeferredWeight(weight.name, weight.shape, weight.type, reordered)


def _table(source: int, target: int) -> dict[str, str]:
    outer = {row[source]: row[target] for row in _OUTER}
    return outer | {f"{_LAYER_PREFIX[source]}.#.{r[source]}": f"{_LAYER_PREFIX[target]}.#.{r[target]}" for r in _LAYER}


_TABLES = {pair: _table(*pair) for pair in ((_HF, _GGUF), (_HF, _META), (_GGUF, _HF), (_META, _HF))}
_NAME = re.compile(r"([^#]+?)(?:(?<=\.)(0|[1-9][0-9]*)(\..+))?\.(weight|bias)")


def _translate(name: str, source: int, target: int) -> str | None:
    match = _NAME.fullmatch(name) if len(name) < 200 else None  # the search is quadratic in hostile names
    if match is None:
        return None
    head, layer, tail, kind = match.groups()
    stem = _TABLES[source, target].get(head if layer is None else f"{head}#{tail}")
    return None if stem is None else f"{stem.replace('#', layer or '')}.{kind}"


def _known(translated: str | None, name: str) -> str:
    if translated is None:
        raise CheckpointError(f"tensor {name} has no name in this format")
    return translated
