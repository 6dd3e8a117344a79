"""Rotary position frequencies of every scaling that the Llama family uses."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from puna.config import ModelConfig, RopeScaling, llama3_factors
from puna.ops.protocol import Batch


def inverse_frequencies(config: ModelConfig, batch: Batch) -> tuple[NDArray[np.float32], float]:
    """Angles per position and the factor on cos and sin, for the tokens of one batch.

    Returns float32[d / 2], or float32[T, d / 2] for dynamic scaling, whose base grows with each sequence's length
    (as transformers does; keys already in the cache keep the base they were written with).
    """
    scaling = config.rope_scaling
    if scaling is None:
        return _default(config.rope_theta, config.head_dim), 1.0
    if scaling.rope_type == "dynamic":
        return _dynamic(config, scaling, batch), 1.0
    return _static(config, scaling)


def _static(config: ModelConfig, scaling: RopeScaling) -> tuple[NDArray[np.float32], float]:
    frequencies = _default(config.rope_theta, config.head_dim)
    if scaling.rope_type == "linear":
        return frequencies / np.float32(scaling.factor), 1.0
    if scaling.rope_type == "yarn":
        return _yarn(config, scaling)
    if scaling.rope_type == "llama3":
        divisors = llama3_factors(scaling, config.rope_theta, config.head_dim)
    else:
        divisors = scaling.factors
    return (frequencies / np.asarray(divisors)).astype(np.float32), 1.0


def _default(theta: float, head_dim: int) -> NDArray[np.float32]:
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    return (1.0 / theta**exponents).astype(np.float32)


def _dynamic(config: ModelConfig, scaling: RopeScaling, batch: Batch) -> NDArray[np.float32]:
    """NTK-aware scaling of the base (u/emozilla 2023): theta grows once a sequence outgrows the trained context."""
    trained = config.max_position_embeddings
    lengths = np.repeat(batch.context_lens, np.diff(batch.seq_starts))
    by_length = {
        int(length): _default(
            config.rope_theta
            * ((scaling.factor * max(length, trained) / trained) - (scaling.factor - 1))
            ** (config.head_dim / (config.head_dim - 2)),
            config.head_dim,
        )
        for length in np.unique(lengths)
    }
    return np.stack([by_length[int(length)] for length in lengths])


def _yarn(config: ModelConfig, scaling: RopeScaling) -> tuple[NDArray[np.float32], float]:
    """YaRN (Peng et al. 2023, §3.2-3.4): interpolate slow dimensions, keep fast ones, temper attention."""
    half = config.head_dim // 2
    original = scaling.original_max_position_embeddings
    assert original is not None

    def dimension(rotations: float) -> float:
        """The (fractional) pair that turns ``rotations`` times within the original context."""
        return half * math.log(original / (rotations * 2 * math.pi)) / math.log(config.rope_theta)

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), config.head_dim - 1)
    span = max(high - low, 0.001)
    interpolated = np.clip((np.arange(half, dtype=np.float64) - low) / span, 0, 1)
    frequencies = _default(config.rope_theta, config.head_dim).astype(np.float64)
    mixed = frequencies / scaling.factor * interpolated + frequencies * (1 - interpolated)
    attention = scaling.attention_factor
    if attention is None:
        attention = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return mixed.astype(np.float32), attention
