"""Typed access to the raw values of a configuration file, naming the field when something is wrong."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from puna.errors import ConfigError

LIMIT = 2**31
LARGEST = 1e30


def whole(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"the model's configuration lacks {key}")
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= LIMIT:
        raise ConfigError(f"{key} must be a whole number below {LIMIT}, found {shown(value)}")
    return value


def flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, found {value!r}")
    return bool(value)


def number(raw: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"the model's configuration lacks {key}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise ConfigError(f"{key} must be a number of at most {LARGEST}, found {shown(value)}")
    return float(value)


def shown(value: Any) -> str:
    """The value in a message; a hostile file may hold a text, list or number that fills the screen."""
    try:
        return repr(value)[:100]
    except (ValueError, RecursionError):  # Python prints no number of more than 4300 digits
        return "something that cannot be shown"


def divide(total: int, parts: int) -> int | None:
    return total // parts if parts > 0 and total % parts == 0 else None


def ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(i for i in map(optional_id, values) if i is not None))


def optional_id(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value >= LIMIT:
        raise ConfigError(f"a token id must be a whole number below {LIMIT}, found {shown(value)}")
    return value if value >= 0 else None


def shortest_float32(value: float) -> float:
    """GGUF stores float32; the shortest decimal that rounds to it is what was meant (1e-05, not 9.99999975e-06)."""
    if not abs(value) < 3.4e38:  # what float32 cannot hold was stored as float64
        return value
    try:
        packed = struct.pack("<f", value)
    except OverflowError:
        return value
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == packed:
            return candidate
    return value
