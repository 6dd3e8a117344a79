"""The functions a Go chat template may call: text/template's own, and those that ollama adds.

``html``, ``js``, ``urlquery`` and ``call`` are left out: no chat template needs them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from typing import Any

from puna.chat.gotemplate.values import Json, Struct, equal, kind_of, less, plain, show, to_json, truth
from puna.chat.sandbox import METER, Refused, size_of

_VERB = re.compile(r"%([-+# 0]*)(\d*)(?:\.(\d*))?(.)", re.DOTALL)
_MAX_WIDTH = 10_000
_TYPESCRIPT = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "array": "any[]",
    "object": "Record<string, any>",
    "null": "null",
}


def made(value: Any, write: Callable[[Any], str]) -> str:
    """The text of a value, measured before it is made and paid for. Raises Refused."""
    meter = METER.get()
    raw = value.raw if isinstance(value, (Json, Struct)) else value
    meter.fits(size_of(raw, meter.largest))
    text = write(value)
    meter.spend(len(text))
    return text


def _eq(first: Any, *others: Any) -> bool:
    _needs("eq", others, 1)
    return any(equal(first, other) for other in others)


def _needs(name: str, arguments: tuple[Any, ...], least: int) -> None:
    if len(arguments) < least:
        raise Refused(f"{name} has too few arguments")


def _len(value: Any) -> int:
    value = plain(value)
    if isinstance(value, str):
        return len(value.encode("utf-8", "replace"))
    if isinstance(value, (list, tuple, Mapping)):
        return len(value)
    raise Refused(f"it asks for the length of a {kind_of(value)}")


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = plain(value)
        if isinstance(value, Mapping) and isinstance(key, str):
            value = value.get(key)
        elif isinstance(value, (list, tuple)) and _is_int(key):
            if not 0 <= key < len(value):
                raise Refused(f"index {key} is out of range: there are {len(value)}")
            value = value[key]
        else:
            raise Refused(f"it takes {key!r} as an index of a {kind_of(value)}")
    return value


def _slice(value: Any, *bounds: Any) -> Any:
    items = plain(value)
    if not isinstance(items, (list, tuple, str)) or len(bounds) > 2 or not all(map(_is_int, bounds)):
        raise Refused(f"it cannot slice a {kind_of(items)} at {', '.join(map(repr, bounds))}")
    data: Any = items.encode("utf-8", "replace") if isinstance(items, str) else items
    start = bounds[0] if bounds else 0
    stop = bounds[1] if len(bounds) > 1 else len(data)
    if not 0 <= start <= stop <= len(data):
        raise Refused(f"a slice from {start} to {stop} is out of range: there are {len(data)}")
    cut = data[start:stop]
    METER.get().spend(len(cut))
    return cut.decode("utf-8", "replace") if isinstance(cut, bytes) else cut


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _print(*values: Any) -> str:
    """Go's Sprint: a space between two values of which neither is a text."""
    parts: list[str] = []
    for i, value in enumerate(values):
        if i and not isinstance(value, str) and not isinstance(values[i - 1], str):
            parts.append(" ")
        parts.append(_text(value))
    return "".join(parts)


def _println(*values: Any) -> str:
    return " ".join(map(_text, values)) + "\n"


def _text(value: Any) -> str:
    return made(value, lambda given: show(given, top=False))


def _printf(layout: Any, *values: Any) -> str:
    if not isinstance(layout, str):
        raise Refused("printf needs a text as its first argument")
    waiting = list(values)

    def written(match: re.Match[str]) -> str:
        flags, width, precision, verb = match.groups()
        if verb == "%":
            return "%"
        if not waiting:
            raise Refused(f"printf has no value for {match[0]!r}")
        text = _formatted(waiting.pop(0), verb, flags, None if precision is None else int(precision[:6] or 0))
        room = int(width[:6] or 0)
        if room > _MAX_WIDTH:
            raise Refused(f"printf asks for a width of {width}")
        if "-" in flags:
            return text.ljust(room)
        return text.zfill(room) if "0" in flags and verb in "dfeg" else text.rjust(room)

    text = _VERB.sub(written, layout)
    METER.get().spend(len(text))
    if waiting:
        raise Refused(f"printf has more values than {layout!r} takes")
    return text


def _formatted(value: Any, verb: str, flags: str, precision: int | None) -> str:
    kind = kind_of(value)
    if verb in "sv":
        text = _text(value)
        return text if precision is None or verb == "v" else text[:precision]
    if verb == "q" and kind == "string":
        return made(plain(value), lambda text: json.dumps(text, ensure_ascii=False))
    if verb == "t" and kind == "bool":
        return show(value)
    sign = "+" if "+" in flags else ""
    if verb in "dxX" and kind == "int":
        return format(plain(value), sign + verb)
    if verb in "feg" and kind == "float":
        if verb == "g" and precision is None:
            return show(value)
        digits = 6 if precision is None else precision
        if digits > _MAX_WIDTH:
            raise Refused(f"printf asks for {digits} digits")
        return format(plain(value), f"{sign}.{digits}{verb}")
    raise Refused(f"printf cannot write a {kind} as %{verb}")


def _typescript_type(value: Any) -> str:
    if not isinstance(value, Struct) or "AnyOf" not in value.fields:
        return "any"
    if truth(value.fields["AnyOf"]):
        return " | ".join(_typescript_type(item) for item in value.fields["AnyOf"])
    return " | ".join(_TYPESCRIPT.get(name, "any") for name in value.fields["Type"]) or "any"


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "not": lambda value: not truth(value),
    "eq": _eq,
    "ne": lambda left, right: not equal(left, right),
    "lt": less,
    "le": lambda left, right: less(left, right) or equal(left, right),
    "gt": lambda left, right: less(right, left),
    "ge": lambda left, right: less(right, left) or equal(left, right),
    "len": _len,
    "index": _index,
    "slice": _slice,
    "print": _print,
    "printf": _printf,
    "println": _println,
    "json": lambda value: made(value, to_json),
    "currentDate": lambda *_layout: date.today().isoformat(),
    "yesterdayDate": lambda *_layout: (date.today() - timedelta(days=1)).isoformat(),
    "toTypeScriptType": _typescript_type,
}
SHORT_CIRCUIT = ("and", "or")
