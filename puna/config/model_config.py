"""The facts of one model, and their spelling in Hugging Face, GGUF and Meta files.

Sources: Hugging Face ``LlamaConfig`` (transformers), the GGUF specification's ``llama.*`` keys, Meta's ``params.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from puna.config.fields import LIMIT, divide, flag, ids, number, optional_id, shortest_float32, shown, whole
from puna.config.rope import RopeScaling, recognise_factors, rope_from_gguf, rope_from_hf, rope_to_hf
from puna.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """Frozen facts of one Llama-architecture model, under Hugging Face's field names.

    ``eos_token_ids`` holds every id that ends a turn. Raises ConfigError on construction when the numbers contradict
    each other, so that whoever holds a ModelConfig holds a possible model.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    architecture: str = "llama"

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < LIMIT:
                raise ConfigError(f"{field} must be a positive whole number, found {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary positions, found {self.head_dim}")
        if not (math.isfinite(self.rms_norm_eps) and self.rms_norm_eps >= 0):
            raise ConfigError(f"rms_norm_eps must be a non-negative number, found {self.rms_norm_eps!r}")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 1):
            raise ConfigError(f"rope_theta must be a number above 1, found {self.rope_theta!r}")
        scaling = self.rope_scaling
        if scaling and scaling.factors and len(scaling.factors) != self.head_dim // 2:
            raise ConfigError(
                f"rope_scaling has {len(scaling.factors)} factors, expected head_dim / 2 = {self.head_dim // 2}"
            )

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """From the contents of a Hugging Face ``config.json``. Raises ConfigError naming the field."""
        model_type = raw.get("model_type", "llama")
        if model_type != "llama":
            raise ConfigError(f"model_type {model_type!r} is not supported; this version runs 'llama' models")
        activation = raw.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ConfigError(f"hidden_act {activation!r} is not supported; Llama models use 'silu'")
        heads = whole(raw, "num_attention_heads")
        hidden = whole(raw, "hidden_size")
        # transformers 5 moved both rope fields into one dictionary.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ConfigError(f"rope_scaling must be an object, found {rope!r}")
        partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise ConfigError(f"partial_rotary_factor {partial!r} is not supported; Llama models rotate whole heads")
        context = whole(raw, "max_position_embeddings", 2048)
        return cls(
            vocab_size=whole(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=whole(raw, "intermediate_size"),
            num_hidden_layers=whole(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=whole(raw, "num_key_value_heads", heads),
            head_dim=whole(raw, "head_dim", divide(hidden, heads)),
            max_position_embeddings=context,
            rms_norm_eps=number(raw, "rms_norm_eps", 1e-6),
            rope_theta=number(rope, "rope_theta", number(raw, "rope_theta", 10000.0)),
            rope_scaling=rope_from_hf(rope, context),
            tie_word_embeddings=flag(raw, "tie_word_embeddings"),
            attention_bias=flag(raw, "attention_bias"),
            mlp_bias=flag(raw, "mlp_bias"),
            bos_token_id=optional_id(raw.get("bos_token_id")),
            eos_token_ids=ids(raw.get("eos_token_id")),
            pad_token_id=optional_id(raw.get("pad_token_id")),
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that transformers reads. Raises ConfigError for explicit rope factors."""
        eos = self.eos_token_ids
        raw: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope_to_hf(self.rope_scaling),
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
            "pad_token_id": self.pad_token_id,
        }
        return raw

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        *,
        tie_word_embeddings: bool,
        attention_bias: bool = False,
        mlp_bias: bool = False,
        rope_factors: tuple[float, ...] = (),
    ) -> ModelConfig:
        """From GGUF metadata. Raises ConfigError naming the key.

        What GGUF tells only by the presence of a tensor (tying, biases, rope factors) is passed in.
        """
        architecture = metadata.get("general.architecture")
        if architecture != "llama":
            raise ConfigError(
                f"general.architecture {architecture!r} is not supported; this version runs 'llama' models"
            )
        if metadata.get("llama.expert_count", 0):
            raise ConfigError("llama.expert_count: mixture-of-experts models are not supported yet")
        heads = whole(metadata, "llama.attention.head_count")
        hidden = whole(metadata, "llama.embedding_length")
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        if not isinstance(tokens, Sequence) or isinstance(tokens, str):
            raise ConfigError(f"tokenizer.ggml.tokens must be an array, found {shown(tokens)}")
        context = whole(metadata, "llama.context_length")
        head_dim = whole(metadata, "llama.attention.key_length", divide(hidden, heads))
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if whole(metadata, key, head_dim) != head_dim:
                raise ConfigError(f"{key} is {metadata[key]}, expected the head dimension {head_dim}")
        theta = number(metadata, "llama.rope.freq_base", 10000.0)
        config = cls(
            vocab_size=whole(metadata, "llama.vocab_size", len(tokens) or None),
            hidden_size=hidden,
            intermediate_size=whole(metadata, "llama.feed_forward_length"),
            num_hidden_layers=whole(metadata, "llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=whole(metadata, "llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=shortest_float32(number(metadata, "llama.attention.layer_norm_rms_epsilon")),
            rope_theta=shortest_float32(theta),
            rope_scaling=rope_from_gguf(metadata, context),
            tie_word_embeddings=tie_word_embeddings,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
            bos_token_id=optional_id(metadata.get("tokenizer.ggml.bos_token_id")),
            eos_token_ids=ids([metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]),
            pad_token_id=optional_id(metadata.get("tokenizer.ggml.padding_token_id")),
        )
        if all(factor == 1.0 for factor in rope_factors):
            return config
        return replace(config, rope_scaling=recognise_factors(rope_factors, config.rope_theta, config.head_dim))

    def to_gguf(self) -> dict[str, Any]:
        """The ``llama.*`` metadata of a GGUF file; token ids and rope factors are written by the GGUF writer."""
        metadata: dict[str, Any] = {
            "general.architecture": "llama",
            "llama.vocab_size": self.vocab_size,
            "llama.context_length": self.max_position_embeddings,
            "llama.embedding_length": self.hidden_size,
            "llama.block_count": self.num_hidden_layers,
            "llama.feed_forward_length": self.intermediate_size,
            "llama.attention.head_count": self.num_attention_heads,
            "llama.attention.head_count_kv": self.num_key_value_heads,
            "llama.attention.key_length": self.head_dim,
            "llama.attention.value_length": self.head_dim,
            "llama.attention.layer_norm_rms_epsilon": float(self.rms_norm_eps),
            "llama.rope.dimension_count": self.head_dim,
            "llama.rope.freq_base": float(self.rope_theta),
        }
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type in ("llama3", "factors"):
            return metadata  # those two travel as the tensor rope_freqs.weight
        if scaling.rope_type == "dynamic":
            raise ConfigError("rope_scaling of type dynamic cannot be written to GGUF; write safetensors instead")
        metadata["llama.rope.scaling.type"] = scaling.rope_type
        metadata["llama.rope.scaling.factor"] = float(scaling.factor)
        if scaling.original_max_position_embeddings:
            metadata["llama.rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        if scaling.rope_type == "yarn":
            if scaling.attention_factor is not None:
                raise ConfigError("rope_scaling attention_factor cannot be written to GGUF; write safetensors instead")
            metadata["llama.rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
            metadata["llama.rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
        return metadata

    @classmethod
    def from_meta(cls, params: Mapping[str, Any], *, vocab_size: int, intermediate_size: int) -> ModelConfig:
        """From Meta's ``params.json``. Raises ConfigError naming the key.

        The two sizes come from the tensors, which are right where ``params.json`` is silent. The context length is not
        in it either; it follows from the release that the other fields identify.
        """
        heads = whole(params, "n_heads")
        hidden = whole(params, "dim")
        theta = number(params, "rope_theta", 10000.0)
        eps = number(params, "norm_eps", 1e-5)
        kv_heads = whole(params, "n_kv_heads", heads)
        scaling = None
        if flag(params, "use_scaled_rope"):
            factor = number(params, "rope_scaling_factor", _meta_rope_factor(hidden))
            scaling = RopeScaling("llama3", factor=factor, original_max_position_embeddings=8192)
        context = _meta_context(hidden, heads, kv_heads, eps, theta, scaling)
        llama3 = vocab_size > 100000
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=intermediate_size,
            num_hidden_layers=whole(params, "n_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=whole(params, "head_dim", divide(hidden, heads)),
            max_position_embeddings=whole(params, "max_position_embeddings", context),
            rms_norm_eps=eps,
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=False,
            bos_token_id=128000 if llama3 else 1,
            eos_token_ids=(128001, 128008, 128009) if llama3 else (2,),
        )

    def to_meta(self) -> dict[str, Any]:
        """The contents of a ``params.json``. Raises ConfigError for what Meta's format cannot express.

        Meta's code refuses unknown keys in some versions, so what it would assume anyway is left out. Token ids are not
        part of the format.
        """
        if self.attention_bias or self.mlp_bias:
            raise ConfigError("biases cannot be written to Meta's format; write safetensors or GGUF instead")
        scaling = self.rope_scaling
        if scaling is not None and scaling != RopeScaling(
            "llama3", factor=scaling.factor, original_max_position_embeddings=8192
        ):
            raise ConfigError(
                f"rope_scaling of type {scaling.rope_type} cannot be written to Meta's format, "
                "which knows only that of Llama 3.1 (type llama3, original context 8192, frequency factors 1 and 4); "
                "write safetensors or GGUF instead"
            )
        # Meta's code derives the inner size: int(multiplier * int(8 / 3 * dim)), rounded up to a multiple of
        # multiple_of.
        params: dict[str, Any] = {
            "dim": self.hidden_size,
            "n_layers": self.num_hidden_layers,
            "n_heads": self.num_attention_heads,
            "n_kv_heads": self.num_key_value_heads,
            "vocab_size": self.vocab_size,
            "multiple_of": self.intermediate_size,
            "ffn_dim_multiplier": self.intermediate_size / (8 * self.hidden_size // 3),
            "norm_eps": self.rms_norm_eps,
        }
        if self.rope_theta != 10000.0:
            params["rope_theta"] = self.rope_theta
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            params["head_dim"] = self.head_dim
        if scaling is not None:
            params["use_scaled_rope"] = True
            if scaling.factor != _meta_rope_factor(self.hidden_size):
                params["rope_scaling_factor"] = scaling.factor
        if self.max_position_embeddings != _meta_context(
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.rms_norm_eps,
            self.rope_theta,
            scaling,
        ):
            params["max_position_embeddings"] = self.max_position_embeddings
        return params


def _meta_rope_factor(hidden_size: int) -> float:
    """Meta's code fixes every other number of its scaling; 1B and 3B were released with 32, larger models with 8."""
    return 32.0 if hidden_size < 4096 else 8.0


def _meta_context(
    hidden_size: int, heads: int, kv_heads: int, eps: float, theta: float, scaling: RopeScaling | None
) -> int:
    """The context of the release: 3.1 and later, 3, Code Llama, 1 or 2 (Llama 1 65B has 2's eps, but not its GQA)."""
    if scaling is not None:
        return 131072
    if theta == 500000.0:
        return 8192
    if theta == 1000000.0:
        return 16384
    return 2048 if eps < 1e-5 or (hidden_size == 8192 and kv_heads == heads) else 4096
