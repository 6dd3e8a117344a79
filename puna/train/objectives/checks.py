"""Checks of the knobs that objectives share."""

from __future__ import annotations

import math
from typing import Any

from puna.errors import TrainingError


def check_number(
    name: str, value: Any, *, above: float = -math.inf, low: float = -math.inf, high: float = math.inf
) -> None:
    """Raises TrainingError unless ``value`` is a finite number, > ``above`` and from ``low`` to ``high``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and value > above and low <= value <= high):
        bounds = [f"above {above:g}"] if above > -math.inf else []
        bounds += [f"of at least {low:g}"] if low > -math.inf else []
        bounds += [f"of at most {high:g}"] if high < math.inf else []
        raise TrainingError(f"{name} must be a number {' and '.join(bounds)}, found {value!r}")


def check_whole(name: str, value: Any, low: int) -> None:
    """Raises TrainingError unless ``value`` is a whole number of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise TrainingError(f"{name} must be a whole number of at least {low}, found {value!r}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises TrainingError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise TrainingError(f"{name} must be one of {', '.join(choices)}; found {value!r}")
