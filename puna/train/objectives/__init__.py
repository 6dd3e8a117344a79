"""What a model is trained for: every objective by name, its knobs, and how its loss is computed."""

from puna.train.objectives.objective import Knobs, MeasuredObjective, Rows
from puna.train.objectives.registry import OBJECTIVES, knobs_of

__all__ = ["OBJECTIVES", "Knobs", "MeasuredObjective", "Rows", "knobs_of"]
