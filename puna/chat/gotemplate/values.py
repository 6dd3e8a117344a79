"""How Go sees values: what is true, how a value prints, how it looks as JSON, how two compare."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from puna.chat.sandbox import Refused


@dataclass(frozen=True)
class Struct:
    """A value with fixed fields: asking for another one is an error. ``raw`` is what its JSON, and its text, show."""

    kind: str
    fields: Mapping[str, Any]
    raw: Any


@dataclass(frozen=True)
class Json:
    """A value whose text is its JSON. ``items`` is what ``range``, ``index`` and fields see."""

    items: Any
    raw: Any


class Names(list[str]):
    """A JSON schema's ``type``: a list in Go, whose text is the name where there is only one."""


def plain(value: Any) -> Any:
    """What lies below a Json."""
    return value.items if isinstance(value, Json) else value


def truth(value: Any) -> bool:
    """Go's truth: not zero, not empty, not nil; a struct is always true."""
    value = plain(value)
    return True if isinstance(value, Struct) else bool(value)


def kind_of(value: Any) -> str:
    """The kind of a value that can be compared, or the name of its type."""
    value = plain(value)
    if value is None:
        return "nil"
    for types, kind in ((bool, "bool"), (int, "int"), (float, "float"), (str, "string")):
        if isinstance(value, types):
            return kind
    if isinstance(value, Struct):
        return value.kind
    return "map" if isinstance(value, Mapping) else "list"


def show(value: Any, top: bool = True) -> str:
    """The text Go prints for a value (``%v``); ollama's own types print as JSON."""
    if isinstance(value, (Json, Struct)):
        return to_json(value)
    if isinstance(value, str):
        return value
    if value is None:
        return "<no value>" if top else "<nil>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, Names) and len(value) == 1:
        return value[0]
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(show(item, top=False) for item in value) + "]"
    return "map[" + " ".join(f"{key}:{show(value[key], top=False)}" for key in sorted(value)) + "]"


def to_json(value: Any) -> str:
    """As Go's json.Marshal: no spaces, and ``<``, ``>``, ``&`` escaped. Order is that of the value."""
    text = json.dumps(_jsonable(value), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _jsonable(value: Any) -> Any:
    if isinstance(value, (Struct, Json)):
        return _jsonable(value.raw)
    if isinstance(value, Names) and len(value) == 1:
        return value[0]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e21:
        return int(value)
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return value


def _float(value: float) -> str:
    """Go's ``%v`` of a float: the shortest digits, with an exponent below 1e-4 and from 1e6 on."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    sign, digits, _ = Decimal(repr(value)).normalize().as_tuple()
    exponent = Decimal(repr(value)).adjusted() if value else 0
    if value and not -4 <= exponent < 6:
        mantissa = "".join(map(str, digits))
        point = "." if len(mantissa) > 1 else ""
        return f"{'-' * sign}{mantissa[0]}{point}{mantissa[1:]}e{exponent:+03d}"
    return f"{Decimal(repr(value)):f}".removesuffix(".0")


def equal(left: Any, right: Any) -> bool:
    """Go's ``eq`` of two values. Raises Refused for kinds that can't be compared."""
    left, right = plain(left), plain(right)
    kinds = {kind_of(left), kind_of(right)}
    if "nil" in kinds:
        return len(kinds) == 1
    if len(kinds) > 1 or not kinds <= {"bool", "int", "float", "string"}:
        raise Refused(f"it compares a {kind_of(left)} with a {kind_of(right)}")
    return bool(left == right)


def less(left: Any, right: Any) -> bool:
    """Go's ``lt``. Raises Refused for kinds that have no order."""
    left, right = plain(left), plain(right)
    if kind_of(left) != kind_of(right) or kind_of(left) not in ("int", "float", "string"):
        raise Refused(f"it asks whether a {kind_of(left)} is less than a {kind_of(right)}")
    return bool(left < right)
