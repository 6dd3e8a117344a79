"""What the objective of a recipe takes beside the model: a teacher, from the store that the model is from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from puna.checkpoint import Checkpoint
from puna.config import ModelConfig
from puna.store import ResolvedModel, Store, resolve
from puna.train.module import LlamaModule
from puna.train.objectives.distill import Distill
from puna.train.objectives.objective import MeasuredObjective
from puna.train.recipe import Recipe

TEACHER = "teacher"  # its cache, in the run's folder


@dataclass(frozen=True)
class Teacher:
    """Where the model is whose logits are learnt, opened without its weights."""

    found: ResolvedModel
    checkpoint: Checkpoint


def find_teacher(recipe: Recipe, config: ModelConfig, store: Store) -> Teacher | None:
    """The recipe's, if it distils. Raises StoreError, CheckpointError, TrainingError for one that cannot be it."""
    knobs = recipe.objective
    if not isinstance(knobs, Distill):
        return None
    found = resolve(knobs.teacher, store)
    return Teacher(found, knobs.open_teacher(found, config))


def make_objective(recipe: Recipe, module: LlamaModule, teacher: Teacher | None, folder: Path) -> MeasuredObjective:
    """``folder`` is the run's, where the teacher's logits are kept if the recipe does not say."""
    knobs = recipe.objective
    if not isinstance(knobs, Distill):
        return knobs.objective(module)
    assert teacher is not None
    cache = folder / TEACHER if knobs.cache is None else Path(knobs.cache)
    return knobs.with_teacher(module, teacher.found, cache if knobs.can_cache else None)
