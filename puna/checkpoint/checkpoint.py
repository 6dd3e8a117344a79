"""What every weights format is read into, and the table of formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from puna.config import ModelConfig
from puna.errors import CheckpointError, TokenizerError
from puna.tensor import Weight
from puna.tokenizer import Tokenizer


@dataclass
class Checkpoint:
    """A model file's contents, read lazily.

    ``tensors`` maps Hugging Face names to weights in the half-split RoPE layout, whatever the file held; a tied head is
    absent. ``description`` holds what the file says of itself (``name``, ``license``, …), for people to read.
    """

    config: ModelConfig
    tensors: Mapping[str, Weight]
    read_tokenizer: Callable[[], Tokenizer | None] = lambda: None
    chat_template: str | None = None
    description: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer stored with the weights, or None. Raises TokenizerError when it is malformed."""
        return self.read_tokenizer()

    def needed_tokenizer(self, path: Path) -> Tokenizer:
        """The same, for who can't do without; ``path`` is named in the TokenizerError."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise TokenizerError(
                f"{path} has no tokenizer; put the model's tokenizer.json or tokenizer.model beside the weights"
            )
        return tokenizer


class CheckpointFormat(Protocol):
    """One weights format. Registered in FORMATS; the conformance test then covers it."""

    def matches(self, path: Path) -> bool:
        """Whether the file or folder looks like this format, judged cheaply."""

    def read(self, path: Path) -> Checkpoint:
        """Map the file. Raises CheckpointError, ConfigError."""

    def write(self, checkpoint: Checkpoint, path: Path, weight_type: str | None) -> None:
        """Write beside ``path``, then rename. ``weight_type`` re-encodes the matrices; None keeps what fits."""


FORMATS: dict[str, str] = {
    "gguf": "puna.checkpoint.gguf:GGUFFormat",
    "safetensors": "puna.checkpoint.huggingface:SafetensorsFormat",
    "meta": "puna.checkpoint.meta_pth:MetaFormat",
}


def checkpoint_format(name: str) -> CheckpointFormat:
    """The format of that name. Raises CheckpointError naming the known ones."""
    if name not in FORMATS:
        raise CheckpointError(f"unknown checkpoint format {name!r}; known: {', '.join(FORMATS)}")
    module, attribute = FORMATS[name].split(":")
    implementation: CheckpointFormat = getattr(import_module(module), attribute)()
    return implementation


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a .gguf file (or one part of a split one), a safetensors file or folder, or a Meta folder.

    Raises CheckpointError when nothing is there or no format recognises it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    for name in FORMATS:
        candidate = checkpoint_format(name)
        if candidate.matches(path):
            return candidate.read(path)
    raise CheckpointError(
        f"{path} is not a model that Puna can read; expected a .gguf file, a folder with config.json and "
        "*.safetensors, or a folder with params.json and consolidated.*.pth"
    )


def save_checkpoint(checkpoint: Checkpoint, path: str | Path, format_name: str, weight_type: str | None = None) -> None:
    """Write a checkpoint. ``weight_type`` (``F32``, ``F16``, ``BF16``, ``Q8_0``, …) re-encodes the matrices.

    Raises CheckpointError when the format cannot hold them.
    """
    checkpoint_format(format_name).write(checkpoint, Path(path).expanduser(), weight_type)
