"""A model ready to run: its configuration, its weights, and the ops they were uploaded to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from puna.config import ModelConfig
from puna.model import llama
from puna.ops.protocol import Array, Batch, KVCache, Ops
from puna.tensor import Weight


@dataclass(frozen=True)
class Model:
    """``forward(batch, kv) -> logits``, with everything else bound."""

    ops: Ops
    config: ModelConfig
    weights: llama.Weights

    @classmethod
    def bind(cls, ops: Ops, config: ModelConfig, tensors: Mapping[str, Weight]) -> Model:
        """Upload every tensor (Hugging Face names)."""
        uploaded = {name: ops.weight(weight) for name, weight in tensors.items()}
        return cls(ops, config, llama.bind(config, uploaded))

    def forward(self, batch: Batch, kv: KVCache) -> Array:
        """Logits [R, V] for ``batch.logit_rows``."""
        return llama.forward(self.ops, self.config, self.weights, batch, kv)

    def hidden(self, batch: Batch, kv: KVCache) -> Array:
        """Final hidden states [T, D], for embeddings."""
        return llama.hidden(self.ops, self.config, self.weights, batch, kv)
