"""Where two recipes differ, key by key."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from puna.errors import TrainingError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def recipe_values(text: str, where: str) -> dict[str, Any]:
    """A TOML text as one flat mapping from dotted keys (``lora.rank``, ``data[0].path``) to values.

    Raises TrainingError, naming ``where``, when it is not TOML.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"{where} is not a recipe in TOML: {error}") from None
    flat: dict[str, Any] = {}
    _flatten(raw, "", flat)
    return flat


def differing(sides: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not the same on all sides, with each side's value; None where it has none."""
    keys = dict.fromkeys(key for side in sides for key in side)
    values = {key: [side.get(key) for side in sides] for key in keys}
    return {key: row for key, row in values.items() if any(_other(value, row[0]) for value in row)}


def _other(a: Any, b: Any) -> bool:
    """True beside 1, and 1.0 beside 1, are other values of a recipe only where their kinds mean other things."""
    return bool(a != b) or isinstance(a, bool) != isinstance(b, bool)


def _flatten(value: Any, key: str, flat: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _flatten(inner, f"{key}.{name}" if key else name, flat)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            _flatten(inner, f"{key}[{number}]", flat)
    else:
        flat[key] = value
