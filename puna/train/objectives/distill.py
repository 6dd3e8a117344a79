"""Distillation: a student learns what a teacher would have said, not only the word that was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from puna.checkpoint import Checkpoint, open_checkpoint
from puna.config import ModelConfig
from puna.errors import TrainingError
from puna.llm.identity import model_identity
from puna.store import ResolvedModel, resolve
from puna.train.data.tokens import Packed
from puna.train.losses import by_chunks, forward_kl, prediction_rows, reverse_kl, top_k_forward_kl
from puna.train.module import LlamaModule
from puna.train.objectives.checks import check_choice, check_number, check_whole
from puna.train.objectives.documents import predictions
from puna.train.objectives.frozen import FrozenModel
from puna.train.objectives.metrics import Metrics
from puna.train.objectives.objective import Rows
from puna.train.objectives.teacher_cache import TeacherCache

Divergence = Callable[[Tensor, slice], Tensor]  # of a chunk of rows of the student's logits, by row


@dataclass(frozen=True)
class Distill:
    """Distillation of logits (Hinton et al. 2015), counted by trained token.

    ``teacher``: a model by name or path, of the same vocabulary; a quantized one stays quantized. ``direction``:
    ``forward``, KL(teacher || student), or ``reverse``, KL(student || teacher) (Gu et al. 2023). ``temperature``
    flattens both distributions, and the divergence is multiplied by its square. ``weight`` is the share of the
    divergence in the loss; the rest is cross entropy.

    With a ``cache``, a folder, the teacher reads each document once, and its ``top_k`` largest logits are kept there,
    as if there were no others: for forward divergence only. Without one it reads along. A recipe's cache is in the
    run's folder if nothing else is said, and ``top_k`` 0 means none.
    """

    rows: ClassVar[Rows] = "documents"
    teacher: str
    direction: str = "forward"
    temperature: float = 1.0
    weight: float = 1.0
    cache: str | None = None
    top_k: int = 64

    def __post_init__(self) -> None:
        check_choice("direction of distill", self.direction, ("forward", "reverse"))
        check_number("temperature of distill", self.temperature, above=0)
        check_number("weight of distill", self.weight, above=0, high=1)
        check_whole("top_k of distill", self.top_k, 0)
        if self.cache is not None and self.top_k == 0:
            raise TrainingError("distill has a cache, but a top_k of 0, which keeps nothing; take one of them out")
        if self.cache is not None and self.direction == "reverse":
            raise TrainingError(
                "reverse divergence needs all of the teacher's logits, and a cache keeps a few; leave the cache out"
            )

    @property
    def can_cache(self) -> bool:
        """Whether some of the teacher's logits are enough."""
        return self.direction == "forward" and self.top_k > 0

    def objective(self, module: LlamaModule) -> Distillation:
        """With a teacher of the user's store. Raises StoreError, CheckpointError, and as ``with_teacher``."""
        cache = None if self.cache is None else Path(self.cache).expanduser()
        return self.with_teacher(module, resolve(self.teacher), cache)

    def with_teacher(self, module: LlamaModule, found: ResolvedModel, cache: Path | None) -> Distillation:
        """Opens the teacher. Raises CheckpointError, and TrainingError as ``open_teacher``."""
        checkpoint = self.open_teacher(found, module.config)
        teacher = FrozenModel(module.ops, checkpoint.config, checkpoint.tensors)
        if cache is None:
            return Distillation(self, module, teacher)
        return Distillation(self, module, teacher, TeacherCache(cache, teacher, model_identity(found), self.top_k))

    def open_teacher(self, found: ResolvedModel, student: ModelConfig) -> Checkpoint:
        """Reads no weights. Raises TrainingError for a teacher with an adapter, another vocabulary, or a ``top_k``
        above it."""
        if found.adapters:
            raise TrainingError(f"the teacher {self.teacher} is a model with an adapter; choose a merged one")
        checkpoint = open_checkpoint(found.path)
        check_vocabulary(student, checkpoint.config)
        if self.top_k > student.vocab_size:
            raise TrainingError(f"top_k of distill must be at most the vocabulary's {student.vocab_size}")
        return checkpoint


def check_vocabulary(student: ModelConfig, teacher: ModelConfig) -> None:
    """Raises TrainingError where the vocabularies differ in size."""
    here, there = student.vocab_size, teacher.vocab_size
    if here != there:
        raise TrainingError(
            f"the teacher has a vocabulary of {there} tokens and the student one of {here}; choose a teacher whose "
            "tokenizer is the student's"
        )


class Distillation:
    """``knobs`` with a teacher that was opened. Raises TrainingError when it has another vocabulary."""

    def __init__(
        self, knobs: Distill, module: LlamaModule, teacher: FrozenModel, cache: TeacherCache | None = None
    ) -> None:
        check_vocabulary(module.config, teacher.config)
        self.metrics = Metrics()
        self._knobs, self._teacher, self._cache = knobs, teacher, cache

    def count(self, micro_batch: Packed) -> int:
        return len(prediction_rows(micro_batch.trained, micro_batch.seq_starts))

    def loss(self, module: LlamaModule, micro_batch: Packed, total: int) -> Tensor:
        found = predictions(module, micro_batch)
        divergence = self._divergence(micro_batch)

        def both(logits: Tensor, chunk: slice) -> Tensor:
            logprobs = torch.log_softmax(logits, -1).gather(1, found.targets[chunk, None])[:, 0]
            return torch.stack([divergence(logits, chunk), -logprobs], 1)

        by_row = by_chunks(found.hidden, module.head(), both)
        self.metrics.add(divergence=by_row[:, 0], cross_entropy=by_row[:, 1])
        weight = self._knobs.weight
        return (weight * by_row[:, 0] + (1 - weight) * by_row[:, 1]).sum() / max(total, 1)

    def _divergence(self, micro_batch: Packed) -> Divergence:
        """The teacher's logits, too, are there for a chunk at a time only."""
        temperature = self._knobs.temperature
        if self._cache is not None:
            ids, top = self._cache.top(micro_batch)
            return lambda logits, chunk: top_k_forward_kl(logits, ids[chunk], top[chunk], temperature)
        kl = forward_kl if self._knobs.direction == "forward" else reverse_kl
        with torch.no_grad():
            hidden, head = predictions(self._teacher, micro_batch).hidden, self._teacher.head()

        def of_chunk(logits: Tensor, chunk: slice) -> Tensor:
            with torch.no_grad():
                teacher_logits = F.linear(hidden[chunk], head)
            return kl(logits, teacher_logits, temperature)

        return of_chunk
