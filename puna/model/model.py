"""A model ready to run: its configuration, its weights, and the ops they were uploaded to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from puna.config import ModelConfig
from puna.model import llama
from puna.ops.protocol import Array, Batch, KVCache, Ops, UploadedChange, UploadedWeight
from puna.tensor import Adapter, Weight

UploadedAdapter = Mapping[str, UploadedChange]


@dataclass(frozen=True)
class Model:
    """``forward(batch, kv) -> logits``, with everything else bound. ``tensors`` have Hugging Face names."""

    ops: Ops
    config: ModelConfig
    tensors: Mapping[str, UploadedWeight]

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
        return cls(ops, config, {name: ready[name] if name in ready else ops.weight(tensors[name]) for name in tensors})

    @cached_property
    def weights(self) -> llama.Weights:
        return llama.bind(self.config, self.tensors)

    def upload(self, adapter: Adapter) -> UploadedAdapter:
        """An adapter, ready for ``adapted``."""
        return {name: self.ops.low_rank(change) for name, change in adapter.changes.items()}

    def adapted(self, adapters: Sequence[UploadedAdapter | None]) -> Model:
        """This model, to which ``Batch.adapters`` may give numbers of ``adapters``. It shares the weights.

        Sequences without an adapter, and those of the number of a None, get what this model gives.
        """

        def weight(name: str) -> UploadedWeight:
            changes = [adapter.get(name) if adapter is not None else None for adapter in adapters]
            used = any(change is not None for change in changes)
            return self.ops.adapted(self.tensors[name], changes) if used else self.tensors[name]

        return Model(self.ops, self.config, {name: weight(name) for name in self.tensors})

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
