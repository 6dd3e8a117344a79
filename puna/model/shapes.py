"""What a model's configuration alone says of it: tensors, parameters, arithmetic and cache."""

from __future__ import annotations

import math

from puna.checkpoint.names import hf_names
from puna.config import ModelConfig


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor's Hugging Face name and shape, matrices as (outputs, inputs); a tied head is absent."""
    return hf_names(config)


def parameter_count(config: ModelConfig) -> int:
    """The exact number of parameters; a tied head counts once, as in published totals."""
    return sum(map(math.prod, tensor_shapes(config).values()))


def flops_per_token(config: ModelConfig, context_length: int = 0) -> int:
    """Floating-point operations of one token's forward, head included, attending to ``context_length`` positions.

    Every matrix element is one multiplication and one addition: ``2 · matrix elements``. Attention adds
    ``4 · L · H · d · context``: scores and weighted sum, 2 operations each, over L layers, H query heads of dimension d
    (Kaplan et al. 2020, table 1; Hoffmann et al. 2022, appendix F). Embedding lookup, norms and rotations are left out.
    """
    head = config.vocab_size * config.hidden_size
    layers = sum(
        math.prod(shape)
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and name.startswith("model.layers.")
    )
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * context_length
    return 2 * (layers + head) + 4 * attention


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: float = 2) -> int:
    """Bytes that one position occupies in the key/value cache, over all layers: ``2 · L · G · d · bytes_per_value``.

    ``bytes_per_value`` may be broken, for caches in block formats; the result is rounded up.
    """
    return math.ceil(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * bytes_per_value)
