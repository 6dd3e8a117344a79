"""The facts of one model, and their spelling in Hugging Face, GGUF and Meta files.

Sources: Hugging Face ``LlamaConfig`` (transformers), the GGUF specification's ``llama.*`` keys, Meta's ``params.json``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from puna.errors import ConfigError

_LIMIT = 2**31
_LARGEST = 1e30
ROPE_TYPES = ("linear", "dynamic", "yarn", "llama3", "factors")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the pretrained context.

    ``rope_type``: ``linear`` (positions divided by ``factor``), ``dynamic`` (NTK-aware base, grows with the sequence),
    ``yarn`` (Peng et al. 2023), ``llama3`` (Meta's piecewise scaling), or ``factors`` (explicit divisors, one for each
    pair of dimensions, as GGUF stores them). ``None`` stands for the default of the type.
    """

    rope_type: str
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError(f"rope_scaling type {self.rope_type!r} is not supported; known: {', '.join(ROPE_TYPES)}")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"rope_scaling {name} must be a positive number, found {value!r}")
        original = self.original_max_position_embeddings
        if original is not None and not 0 < original < _LIMIT:
            raise ConfigError(f"rope_scaling original_max_position_embeddings must be positive, found {original!r}")
        if self.rope_type == "llama3":
            if not self.original_max_position_embeddings:
                raise ConfigError("rope_scaling of type llama3 needs original_max_position_embeddings")
            if not 0 < self.low_freq_factor < self.high_freq_factor:
                raise ConfigError(
                    "rope_scaling of type llama3 needs 0 < low_freq_factor < high_freq_factor, "
                    f"found {self.low_freq_factor} and {self.high_freq_factor}"
                )
        if self.rope_type == "factors" and not (self.factors and all(math.isfinite(f) and f > 0 for f in self.factors)):
            raise ConfigError("rope_scaling of type factors needs positive numbers, one for each pair of dimensions")


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
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LIMIT:
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
        heads = _whole(raw, "num_attention_heads")
        hidden = _whole(raw, "hidden_size")
        # transformers 5 moved both rope fields into one dictionary.
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ConfigError(f"rope_scaling must be an object, found {rope!r}")
        partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise ConfigError(f"partial_rotary_factor {partial!r} is not supported; Llama models rotate whole heads")
        context = _whole(raw, "max_position_embeddings", 2048)
        return cls(
            vocab_size=_whole(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_whole(raw, "intermediate_size"),
            num_hidden_layers=_whole(raw, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_whole(raw, "num_key_value_heads", heads),
            head_dim=_whole(raw, "head_dim", _divide(hidden, heads)),
            max_position_embeddings=context,
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            rope_theta=_number(rope, "rope_theta", _number(raw, "rope_theta", 10000.0)),
            rope_scaling=_rope_from_hf(rope, context),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            attention_bias=_flag(raw, "attention_bias"),
            mlp_bias=_flag(raw, "mlp_bias"),
            bos_token_id=_optional_id(raw.get("bos_token_id")),
            eos_token_ids=_ids(raw.get("eos_token_id")),
            pad_token_id=_optional_id(raw.get("pad_token_id")),
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
            "rope_scaling": _rope_to_hf(self.rope_scaling),
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
        heads = _whole(metadata, "llama.attention.head_count")
        hidden = _whole(metadata, "llama.embedding_length")
        tokens = metadata.get("tokenizer.ggml.tokens", [])
        if not isinstance(tokens, (list, tuple)):
            raise ConfigError(f"tokenizer.ggml.tokens must be an array, found {_shown(tokens)}")
        context = _whole(metadata, "llama.context_length")
        head_dim = _whole(metadata, "llama.attention.key_length", _divide(hidden, heads))
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if _whole(metadata, key, head_dim) != head_dim:
                raise ConfigError(f"{key} is {metadata[key]}, expected the head dimension {head_dim}")
        theta = _number(metadata, "llama.rope.freq_base", 10000.0)
        config = cls(
            vocab_size=_whole(metadata, "llama.vocab_size", len(tokens) or None),
            hidden_size=hidden,
            intermediate_size=_whole(metadata, "llama.feed_forward_length"),
            num_hidden_layers=_whole(metadata, "llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=_whole(metadata, "llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=_shortest_float32(_number(metadata, "llama.attention.layer_norm_rms_epsilon")),
            rope_theta=_shortest_float32(theta),
            rope_scaling=_rope_from_gguf(metadata, context),
            tie_word_embeddings=tie_word_embeddings,
            attention_bias=attention_bias,
            mlp_bias=mlp_bias,
            bos_token_id=_optional_id(metadata.get("tokenizer.ggml.bos_token_id")),
            eos_token_ids=_ids([metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]),
            pad_token_id=_optional_id(metadata.get("tokenizer.ggml.padding_token_id")),
        )
        if not rope_factors:
            return config
        return replace(config, rope_scaling=_recognise_factors(rope_factors, config))

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
        heads = _whole(params, "n_heads")
        hidden = _whole(params, "dim")
        theta = _number(params, "rope_theta", 10000.0)
        eps = _number(params, "norm_eps", 1e-5)
        kv_heads = _whole(params, "n_kv_heads", heads)
        scaling = None
        if _flag(params, "use_scaled_rope"):
            factor = _number(params, "rope_scaling_factor", _meta_rope_factor(hidden))
            scaling = RopeScaling("llama3", factor=factor, original_max_position_embeddings=8192)
        context = _meta_context(hidden, heads, kv_heads, eps, theta, scaling)
        llama3 = vocab_size > 100000
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=intermediate_size,
            num_hidden_layers=_whole(params, "n_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=_whole(params, "head_dim", _divide(hidden, heads)),
            max_position_embeddings=_whole(params, "max_position_embeddings", context),
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


def llama3_factors(scaling: RopeScaling, theta: float, head_dim: int) -> tuple[float, ...]:
    """Frequency divisors of Llama 3.1's piecewise scaling, one for each pair of dimensions (Meta, llama-models)."""
    original = scaling.original_max_position_embeddings
    assert original is not None
    divisors = []
    for pair in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
        if wavelength < original / scaling.high_freq_factor:
            divisors.append(1.0)
        elif wavelength > original / scaling.low_freq_factor:
            divisors.append(scaling.factor)
        else:
            smooth = (original / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return tuple(divisors)


def _recognise_factors(factors: tuple[float, ...], config: ModelConfig) -> RopeScaling | None:
    """GGUF keeps only Llama 3.1's resulting divisors; name the published parameters that give them, if any do."""
    if all(f == 1.0 for f in factors):
        return config.rope_scaling
    published = RopeScaling("llama3", factor=_shortest_float32(max(factors)), original_max_position_embeddings=8192)
    expected = llama3_factors(published, config.rope_theta, config.head_dim)
    if len(expected) == len(factors) and all(
        math.isclose(a, b, rel_tol=1e-5) for a, b in zip(expected, factors, strict=True)
    ):
        return published
    return RopeScaling("factors", factors=factors)


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


def _rope_from_hf(rope: Mapping[str, Any], context: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default")) or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        raise ConfigError(f"rope_scaling type {_shown(kind)} is not supported; known: linear, dynamic, yarn, llama3")
    for unsupported in ("mscale", "mscale_all_dim"):
        if rope.get(unsupported):
            raise ConfigError(f"rope_scaling.{unsupported} is not supported; it belongs to another model family")
    if rope.get("truncate", True) is not True:
        raise ConfigError("rope_scaling.truncate = false is not supported; it belongs to another model family")
    original = None  # linear and dynamic scaling have no use for it
    if kind == "yarn":
        original = _whole(rope, "original_max_position_embeddings", context)
    elif kind == "llama3":
        original = _whole(rope, "original_max_position_embeddings")
    return RopeScaling(
        rope_type=kind,
        factor=_number(rope, "factor", context / original if original and kind == "yarn" else None),
        original_max_position_embeddings=original,
        low_freq_factor=_number(rope, "low_freq_factor", 1.0),
        high_freq_factor=_number(rope, "high_freq_factor", 4.0),
        attention_factor=None if rope.get("attention_factor") is None else _number(rope, "attention_factor"),
        beta_fast=_number(rope, "beta_fast", 32.0),
        beta_slow=_number(rope, "beta_slow", 1.0),
    )


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.rope_type == "factors":
        raise ConfigError("explicit rope factors cannot be written to a Hugging Face config; write GGUF instead")
    raw: dict[str, Any] = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.original_max_position_embeddings:
        raw["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        raw |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.rope_type == "yarn":
        raw |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            raw["attention_factor"] = scaling.attention_factor
    return raw


def _rope_from_gguf(metadata: Mapping[str, Any], context: int) -> RopeScaling | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = metadata.get("llama.rope.scaling.factor")
    if kind == "none" and "llama.rope.scale_linear" in metadata:
        kind, factor = "linear", metadata["llama.rope.scale_linear"]
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(f"llama.rope.scaling.type {kind!r} is not supported; known: none, linear, yarn")
    if _number(metadata, "llama.rope.scaling.attn_factor", 1.0) != 1.0:
        raise ConfigError("llama.rope.scaling.attn_factor is not supported; convert the model from safetensors instead")
    original = _whole(metadata, "llama.rope.scaling.original_context_length", context)
    return RopeScaling(
        rope_type=kind,
        factor=_shortest_float32(_number({"llama.rope.scaling.factor": factor}, "llama.rope.scaling.factor")),
        original_max_position_embeddings=original if kind == "yarn" else None,
        beta_fast=_number(metadata, "llama.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=_number(metadata, "llama.rope.scaling.yarn_beta_slow", 1.0),
    )


def _whole(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"the model's configuration lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= _LIMIT:
        raise ConfigError(f"{key} must be a whole number below {_LIMIT}, found {_shown(value)}")
    return value


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, found {value!r}")
    return bool(value)


def _number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"the model's configuration lacks {key}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:
        raise ConfigError(f"{key} must be a number of at most {_LARGEST}, found {_shown(value)}")
    return float(value)


def _shown(value: Any) -> str:
    """The value in a message; a hostile file may hold a text, list or number that fills the screen."""
    try:
        return repr(value)[:100]
    except (ValueError, RecursionError):  # Python prints no number of more than 4300 digits
        return "something that cannot be shown"


def _divide(total: int, parts: int) -> int | None:
    return total // parts if parts > 0 and total % parts == 0 else None


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(i for i in map(_optional_id, values) if i is not None))


def _optional_id(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value >= _LIMIT:
        raise ConfigError(f"a token id must be a whole number below {_LIMIT}, found {_shown(value)}")
    return value if value >= 0 else None


def _shortest_float32(value: float) -> float:
    """GGUF stores float32; the shortest decimal that rounds to it is what was meant (1e-05, not 9.99999975e-06)."""
    if not abs(value) < 3.4e38:  # what float32 cannot hold was stored as float64
        return value
    try:
        packed = struct.pack("<f", value)
    except OverflowError:
        return value
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == packed:
            return candidate
    return value
