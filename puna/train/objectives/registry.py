"""The objectives by name."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from puna.errors import TrainingError
from puna.train.objectives.distill import Distill
from puna.train.objectives.grpo import GRPO
from puna.train.objectives.labelled import KTO
from puna.train.objectives.next_token import SFT, Pretrain
from puna.train.objectives.objective import Knobs
from puna.train.objectives.pairs import DPO, IPO, ORPO, SimPO
from puna.train.objectives.reward import Reward

OBJECTIVES: dict[str, type[Knobs]] = {
    "pretrain": Pretrain,
    "sft": SFT,
    "distill": Distill,
    "reward": Reward,
    "dpo": DPO,
    "ipo": IPO,
    "kto": KTO,
    "orpo": ORPO,
    "simpo": SimPO,
    "grpo": GRPO,
}


def knobs_of(name: str, table: Mapping[str, Any]) -> Knobs:
    """The objective of that name with the knobs of a table. Raises TrainingError for an unknown one, with the nearest
    that there is, for a knob that is missing, and for a value that makes no sense."""
    if name not in OBJECTIVES:
        raise TrainingError(f"there is no objective {name!r}; {_known(name, OBJECTIVES)}")
    kind = OBJECTIVES[name]
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in table:
        if key not in fields:
            raise TrainingError(f"the objective {name} has no {key!r}; {_known(key, fields)}")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING and field.name not in table:
            raise TrainingError(f"the objective {name} needs {field.name!r}")
    return kind(**table)


def _known(name: str, names: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, names, 1)
    if nearest:
        return f"did you mean {nearest[0]!r}?"
    return f"known: {', '.join(names) or 'it has none'}"
