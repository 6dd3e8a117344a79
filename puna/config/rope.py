"""How rotary positions are stretched, and its spelling in Hugging Face and GGUF files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from puna.config.fields import LIMIT, number, shortest_float32, shown, whole
from puna.errors import ConfigError

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
        if original is not None and not 0 < original < LIMIT:
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


def recognise_factors(factors: tuple[float, ...], theta: float, head_dim: int) -> RopeScaling:
    """GGUF keeps only Llama 3.1's resulting divisors; name the published parameters that give them, if any do."""
    published = RopeScaling("llama3", factor=shortest_float32(max(factors)), original_max_position_embeddings=8192)
    expected = llama3_factors(published, theta, head_dim)
    if len(expected) == len(factors) and all(
        math.isclose(a, b, rel_tol=1e-5) for a, b in zip(expected, factors, strict=True)
    ):
        return published
    return RopeScaling("factors", factors=factors)


def rope_from_hf(rope: Mapping[str, Any], context: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default")) or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        raise ConfigError(f"rope_scaling type {shown(kind)} is not supported; known: linear, dynamic, yarn, llama3")
    for unsupported in ("mscale", "mscale_all_dim"):
        if rope.get(unsupported):
            raise ConfigError(f"rope_scaling.{unsupported} is not supported; it belongs to another model family")
    if rope.get("truncate", True) is not True:
        raise ConfigError("rope_scaling.truncate = false is not supported; it belongs to another model family")
    original = None  # linear and dynamic scaling have no use for it
    if kind == "yarn":
        original = whole(rope, "original_max_position_embeddings", context)
    elif kind == "llama3":
        original = whole(rope, "original_max_position_embeddings")
    return RopeScaling(
        rope_type=kind,
        factor=number(rope, "factor", context / original if original and kind == "yarn" else None),
        original_max_position_embeddings=original,
        low_freq_factor=number(rope, "low_freq_factor", 1.0),
        high_freq_factor=number(rope, "high_freq_factor", 4.0),
        attention_factor=None if rope.get("attention_factor") is None else number(rope, "attention_factor"),
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
    )


def rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
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


def rope_from_gguf(metadata: Mapping[str, Any], context: int) -> RopeScaling | None:
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = metadata.get("llama.rope.scaling.factor")
    if kind == "none" and "llama.rope.scale_linear" in metadata:
        kind, factor = "linear", metadata["llama.rope.scale_linear"]
    if kind == "none" or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError(f"llama.rope.scaling.type {kind!r} is not supported; known: none, linear, yarn")
    if number(metadata, "llama.rope.scaling.attn_factor", 1.0) != 1.0:
        raise ConfigError("llama.rope.scaling.attn_factor is not supported; convert the model from safetensors instead")
    original = whole(metadata, "llama.rope.scaling.original_context_length", context)
    return RopeScaling(
        rope_type=kind,
        factor=shortest_float32(number({"llama.rope.scaling.factor": factor}, "llama.rope.scaling.factor")),
        original_max_position_embeddings=original if kind == "yarn" else None,
        beta_fast=number(metadata, "llama.rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=number(metadata, "llama.rope.scaling.yarn_beta_slow", 1.0),
    )
