"""Rewards that can be verified: functions of an answer's text and of what was expected, 1 for right and 0 for wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from puna.errors import TrainingError
from puna.train.json_check import check_schema, is_valid

Reward = Callable[[str, str], float]

REWARDS = ("exact", "number", "regex", "json")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def reward_named(name: str, pattern: str | None = None, schema: str | None = None) -> Reward:
    """``regex`` takes a ``pattern`` and ``json`` may take the path of a JSON ``schema``. Raises TrainingError."""
    if name not in REWARDS:
        raise TrainingError(f"the reward must be one of {', '.join(REWARDS)}; found {name!r}")
    if (pattern is not None) != (name == "regex") or (schema is not None and name != "json"):
        raise TrainingError("a pattern belongs to the reward regex, which needs one, and a schema to the reward json")
    if pattern is not None:
        try:
            return partial(matches, re.compile(pattern))
        except re.error as error:
            raise TrainingError(f"the pattern {pattern!r} is no regular expression: {error}") from None
    if name == "json":
        return partial(json_answer, _read_schema(schema))
    return {"exact": exact, "number": number}[name]


def exact(answer: str, expected: str) -> float:
    """The expected text, but for white space around it."""
    return float(answer.strip() == expected.strip())


def number(answer: str, expected: str) -> float:
    """The expected number: what stands behind ``####`` (GSM8K, Cobbe et al. 2021), or else the last one of the text."""
    found, wanted = _final_number(answer), _final_number(expected)
    return float(found is not None and found == wanted)


def matches(pattern: re.Pattern[str], answer: str, expected: str) -> float:
    """The pattern is found in the answer, whatever was expected."""
    return float(pattern.search(answer) is not None)


def json_answer(schema: Any, answer: str, expected: str) -> float:
    """JSON and nothing else, valid by the schema, whatever was expected."""
    try:
        value = json.loads(answer, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return 0.0
    return float(is_valid(value, schema))


def _final_number(text: str) -> Decimal | None:
    _, marked, rest = text.rpartition("####")
    found = _NUMBER.findall(rest)
    if not found:
        return None
    return Decimal((found[0] if marked else found[-1]).replace(",", ""))


def _read_schema(path: str | None) -> Any:
    if path is None:
        return True
    try:
        schema = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} is not readable as a JSON schema: {error}") from None
    check_schema(schema)
    return schema


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
