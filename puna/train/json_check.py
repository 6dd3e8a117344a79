"""Whether a value is valid by a JSON schema, for the keywords that schemas of answers use (JSON Schema, draft 7)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from puna.errors import TrainingError

_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "integer": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and float(v).is_integer(),
}
_NOTES = ("$schema", "$id", "$comment", "title", "description", "default", "examples")


def check_schema(schema: Any) -> None:
    """Raises TrainingError for what ``is_valid`` does not know, naming it."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise TrainingError(f"a JSON schema must be an object or a truth value, found {schema!r:.80}")
    for keyword, value in schema.items():
        if keyword not in _CHECKS and keyword not in _NOTES:
            raise TrainingError(f"the reward json does not know the keyword {keyword!r}; use {', '.join(_CHECKS)}")
        if keyword == "pattern":
            try:
                re.compile(value)
            except (re.error, TypeError) as error:
                raise TrainingError(f"the pattern {value!r} of a JSON schema cannot be used: {error}") from None
        elif keyword == "properties":
            for part in value.values():
                check_schema(part)
        elif keyword in ("items", "additionalProperties", "not"):
            check_schema(value)
        elif keyword in ("anyOf", "allOf", "oneOf"):
            for part in value:
                check_schema(part)


def is_valid(value: Any, schema: Any) -> bool:
    """``schema`` has passed ``check_schema``."""
    if isinstance(schema, bool):
        return schema
    return all(_CHECKS[k](value, given, schema) for k, given in schema.items() if k in _CHECKS)


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: 1 is 1.0, but not true."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _of(kind: str, check: Callable[[Any, Any], bool]) -> Callable[[Any, Any, Any], bool]:
    """A keyword that says nothing about values of another type."""
    return lambda value, given, schema: not _TYPES[kind](value) or check(value, given)


def _type(value: Any, given: Any, schema: Any) -> bool:
    return any(_TYPES[name](value) for name in ([given] if isinstance(given, str) else given))


def _additional(value: Any, given: Any, schema: Any) -> bool:
    others = value.keys() - schema.get("properties", {}).keys() if isinstance(value, dict) else ()
    return all(is_valid(value[key], given) for key in others)


_CHECKS: dict[str, Callable[[Any, Any, Any], bool]] = {
    "type": _type,
    "enum": lambda v, given, s: any(_same(v, one) for one in given),
    "const": lambda v, given, s: _same(v, given),
    "properties": _of("object", lambda v, given: all(is_valid(v[k], part) for k, part in given.items() if k in v)),
    "required": _of("object", lambda v, given: all(key in v for key in given)),
    "additionalProperties": _additional,
    "items": _of("array", lambda v, given: all(is_valid(item, given) for item in v)),
    "minItems": _of("array", lambda v, given: len(v) >= given),
    "maxItems": _of("array", lambda v, given: len(v) <= given),
    "minLength": _of("string", lambda v, given: len(v) >= given),
    "maxLength": _of("string", lambda v, given: len(v) <= given),
    "pattern": _of("string", lambda v, given: re.search(given, v) is not None),
    "minimum": _of("number", lambda v, given: bool(v >= given)),
    "maximum": _of("number", lambda v, given: bool(v <= given)),
    "anyOf": lambda v, given, s: any(is_valid(v, part) for part in given),
    "allOf": lambda v, given, s: all(is_valid(v, part) for part in given),
    "oneOf": lambda v, given, s: sum(is_valid(v, part) for part in given) == 1,
    "not": lambda v, given, s: not is_valid(v, given),
}
