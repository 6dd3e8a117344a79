"""What is quantized: a model's contents, and what tells it from every other model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from puna.checkpoint import Checkpoint, open_checkpoint
from puna.checkpoint.lora_writer import merge
from puna.llm.identity import model_identity
from puna.store import resolve
from puna.tensor import Adapter


@dataclass(frozen=True)
class Source:
    """A model of the store or of a ``path``; ``identity`` is a text that differs where its weights do."""

    path: Path
    checkpoint: Checkpoint
    identity: str

    @classmethod
    def open(cls, name_or_path: str | Path) -> Source:
        """Raises StoreError, CheckpointError, ConfigError."""
        found = resolve(name_or_path)
        return cls(found.path, open_checkpoint(found.path), model_identity(found))

    def merged(self, adapter: Adapter, *, keep_types: bool = False) -> Source:
        """With an adapter in its matrices (``puna.checkpoint.lora_writer.merge``)."""
        identity = f"{self.identity} with {adapter.digest}"
        return Source(self.path, merge(self.checkpoint, adapter, keep_types=keep_types), identity)
