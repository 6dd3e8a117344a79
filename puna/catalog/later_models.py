"""Models whose forward comes in a later version, as the facts of their ``config.json``: multimodal 3.2, and Llama 4.

What is not known beyond doubt is absent. Sources: the published configs, transformers' converters, Meta's llama-models.
"""

from __future__ import annotations

from typing import Any

from puna.catalog import licences
from puna.catalog.entry import CatalogEntry, Licence, Source

Facts = dict[str, Any]
_ROPE_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _mllama(hidden: int, ffn: int, layers: int, heads: int, image_size: int) -> Facts:
    """A Llama 3.1 text model in which one layer in five attends to the image instead of the text."""
    return {
        "model_type": "mllama",
        "image_token_index": 128256,
        "text_config": {
            "vocab_size": 128256,
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "cross_attention_layers": list(range(3, layers, 5)),
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "rope_scaling": _ROPE_3_1,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_global_layers": 8,
            "attention_heads": 16,
            "image_size": image_size,
            "patch_size": 14,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [3, 7, 15, 23, 30],
            "vision_output_dim": 7680,
        },
    }


def _llama4(**text: Any) -> Facts:
    """A Llama 4: experts in every ``interleave_moe_layer_step``-th layer, no rotary positions in every fourth layer."""
    return {
        "model_type": "llama4",
        "image_token_index": 200092,
        "text_config": {
            "vocab_size": 202048,
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 200000,
            **text,
        },
        "vision_config": {
            "hidden_size": 1408,
            "intermediate_size": 5632,
            "num_hidden_layers": 34,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
            "pixel_shuffle_ratio": 0.5,
            "projector_input_dim": 4096,
            "projector_output_dim": 4096,
            "vision_output_dim": 4096,
        },
    }


def _mixture(experts: int, step: int, *, context: int, tuned: bool, **text: Any) -> Facts:
    return _llama4(
        num_local_experts=experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=step,
        no_rope_layer_interval=4,
        attention_chunk_size=8192,
        max_position_embeddings=context,
        use_qk_norm=step == 1,
        eos_token_id=[200001, 200007, 200008] if tuned else 200001,
        **text,
    )


_SCOUT_ROPE = _ROPE_3_1 | {"factor": 16.0, "high_freq_factor": 1.0}
_11B = (4096, 14336, 40, 32)
_90B = (8192, 28672, 100, 64)


def later_entries() -> list[CatalogEntry]:
    """The entries that can be listed and fetched, but not run yet."""
    v, four = licences.LLAMA_3_2, licences.LLAMA_4
    table: tuple[tuple[str, str, int, Facts, Licence], ...] = (
        ("llama-3.2", "Llama-3.2-11B-Vision", 10_642_941_475, _mllama(*_11B, 448), v),
        ("llama-3.2", "Llama-3.2-11B-Vision-Instruct", 10_670_220_835, _mllama(*_11B, 560), v),
        ("llama-3.2", "Llama-3.2-90B-Vision", 88_593_355_323, _mllama(*_90B, 560), v),
        ("llama-3.2", "Llama-3.2-90B-Vision-Instruct", 88_593_355_323, _mllama(*_90B, 560), v),
        ("llama-guard-3", "Llama-Guard-3-11B-Vision", 10_670_220_835, _mllama(*_11B, 560), v),
        (
            "llama-4",
            "Llama-4-Scout-17B-16E",
            108_641_793_536,
            _mixture(16, 1, context=262144, tuned=False),
            four,
        ),
        (
            "llama-4",
            "Llama-4-Scout-17B-16E-Instruct",
            108_641_793_536,
            _mixture(16, 1, context=10485760, tuned=True, rope_scaling=_SCOUT_ROPE),
            four,
        ),
        (
            "llama-4",
            "Llama-4-Maverick-17B-128E",
            401_583_781_376,
            _mixture(128, 2, context=262144, tuned=False, rope_scaling=None),
            four,
        ),
        (
            "llama-4",
            "Llama-4-Maverick-17B-128E-Instruct",
            401_583_781_376,
            _mixture(128, 2, context=1048576, tuned=True, rope_scaling=None),
            four,
        ),
        (
            "llama-guard-4",
            "Llama-Guard-4-12B",
            12_001_097_216,
            # Scout with its shared experts only: no layer has a mixture.
            _llama4(intermediate_size_mlp=8192, moe_layers=[], eos_token_id=[200001, 200007, 200008]),
            four,
        ),
    )
    return [
        CatalogEntry(
            name.lower(),
            family,
            name.replace("-", " "),
            parameters,
            licence,
            gated=True,
            sources=(Source("huggingface", f"meta-llama/{name}"),),
            shape=facts,
        )
        for family, name, parameters, facts, licence in table
    ]
