"""A model ready to run: its configuration, its weights, and the ops they were uploaded to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from puna.config import ModelConfig
from puna.model import llama
from puna.ops.protocol import Array, Batch, KVCache, Ops, UploadedWeight
from puna.tensor import Weight


@dataclass(frozen=True)
class Model:
    """``forward(batch, kv) -> logits``, with everything else bound."""

    ops: Ops
    config: ModelConfig
    weights: llama.Weights

    @classmethod
    def bind(
        cls,
        ops: Ops,
        config: ModelConfig,
        tensors: Mapping[str, Weight],
        uploaded: Mapping[str, UploadedWeight] | None = None,
    ) -> Model:
        """Upload every tensor (Hugging Face names) but those that are ``uploaded``, which are not even read."""
        ready = uploaded or {}
        uploaded = {name: ready[name] if name in ready else ops.weight(tensors[name]) for name in tensors}
        return cls(ops, config, llama.bind(config, uploaded))

    def forward(self, batch: Batch, kv: KVCache) -> Array:
        """Logits [R, V] for ``batch.logit_rows``."""
        return self._forward(batch, kv)

    def hidden(self, batch: Batch, kv: KVCache) -> Array:
        """Final hidden states [T, D], for embeddings."""
        return self._hidden(batch, kv)

    @cached_property
    def _forward(self) -> Callable[[Batch, KVCache], Array]:
        config, weights = self.config, self.weights
        return self.ops.compiled(lambda ops, batch, kv: llama.forward(ops, config, weights, batch, kv))

    @cached_property
    def _hidden(self) -> Callable[[Batch, KVCache], Array]:
        config, weights = self.config, self.weights
        return self.ops.compiled(lambda ops, batch, kv: llama.hidden(ops, config, weights, batch, kv))
