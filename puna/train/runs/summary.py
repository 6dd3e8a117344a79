"""One run in some numbers, and several runs side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from puna.train.runs.differences import differing
from puna.train.runs.metrics import Row, curve
from puna.train.runs.record import Evaluation
from puna.train.runs.run import Run

_SUMMED = {"tokens": "total_tokens", "seconds": "total_seconds"}  # numbers of a step that add up

_BEST: dict[str, Callable[[list[float]], float]] = {"validation_loss": min, "validation_reward": max}


def names_of(rows: Sequence[Row]) -> list[str]:
    """What was measured, in the order in which it first was."""
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name not in ("step", "time")]


def final_numbers(run: Run) -> dict[str, float]:
    """``steps``, the last of every metric, the sums of tokens and seconds, the best of held-out rows, and what was
    evaluated before and after."""
    rows = run.metrics()
    numbers: dict[str, float] = {"steps": rows[-1]["step"] if rows else 0}
    for name in names_of(rows):
        values = [value for _, value in curve(rows, name)]
        if values:
            numbers[_SUMMED.get(name, name)] = math.fsum(values) if name in _SUMMED else values[-1]
        if values and name in _BEST:
            numbers[f"best_{name}"] = _BEST[name](values)
    record = run.record
    for when, evaluation in (("before", record.before), ("after", record.after)):
        numbers |= {f"{name}_{when}": value for name, value in (evaluation.numbers if evaluation else {}).items()}
    return numbers


def overview(run: Run) -> dict[str, Any]:
    """A line of ``puna runs``: losses, or rewards, are those of the held-out rows before and after training."""
    record, rows = run.record, run.metrics()
    return {
        "name": run.name,
        "status": run.state,
        "model": record.inputs.model,
        "objective": record.inputs.objective,
        "method": record.inputs.method,
        "steps": rows[-1]["step"] if rows else 0,
        "planned_steps": record.inputs.steps,
        "loss_before": _value(record.before, "loss"),
        "loss_after": _value(record.after, "loss"),
        "reward_before": _value(record.before, "reward"),
        "reward_after": _value(record.after, "reward"),
        "started": record.starts[0].time,
    }


def circumstances(run: Run) -> dict[str, Any]:
    """What beside the recipe may make two runs differ, by dotted keys."""
    inputs, start = run.record.inputs, run.record.starts[-1]
    return {
        "model": inputs.model,
        "model_digest": inputs.model_digest,
        **{f"data[{number}].digest": data.digest for number, data in enumerate(inputs.data)},
        "seed": inputs.seed,
        **{f"versions.{name}": version for name, version in start.versions.items()},
        "device": inputs.device,
        "cpu": start.cpu,
        "cores": start.cores,
    }


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Side by side: ``recipe`` and ``circumstances``, where they differ only, and ``numbers``, all; a value a run."""
    finals = [final_numbers(run) for run in runs]
    return {
        "runs": [run.name for run in runs],
        "status": [run.state for run in runs],
        "recipe": differing([run.recipe_values() for run in runs]),
        "circumstances": differing([circumstances(run) for run in runs]),
        "numbers": {
            name: [final.get(name) for final in finals] for name in dict.fromkeys(n for f in finals for n in f)
        },
    }


def shown(value: Any) -> str:
    """A value of a recipe or a number, for people; no character of it moves a terminal's cursor."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:,.0f}" if 100_000 <= abs(value) < 1e15 else f"{value:.5g}"
    if isinstance(value, int):
        return f"{value:,}"
    return "".join(character if character.isprintable() else " " for character in str(value))


def _value(evaluation: Evaluation | None, name: str) -> float | None:
    return None if evaluation is None else evaluation.numbers.get(name)
