"""What all objectives are: knobs, which a recipe spells, that make what the trainer minimises."""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

from puna.train.module import LlamaModule
from puna.train.objectives.metrics import Metrics
from puna.train.trainer import Objective

Rows = Literal["documents", "pairs", "labelled", "prompts"]


class MeasuredObjective(Objective, Protocol):
    """An objective of the trainer that also measures; ``metrics.means()`` are those since the last look."""

    metrics: Metrics


class Knobs(Protocol):
    """A frozen dataclass of an objective's knobs, the [objective] table of a recipe.

    Raises TrainingError for a value that makes no sense. ``rows``: ``documents`` come packed (PackedStream), ``pairs``
    and ``labelled`` answers as they are (AnswerStream), and of ``prompts`` the answers are sampled (RolloutStream).
    """

    rows: ClassVar[Rows]

    def objective(self, module: LlamaModule) -> MeasuredObjective:
        """To be made before the trainer, for it may add parameters to the module."""
