"""TOML tables as frozen dataclasses, and back. The dataclasses are the schema: names, types and defaults.

A field may be a bool, int, float, str, Literal, tuple, mapping, another dataclass, or any of these or None. None has no
spelling in TOML: the key is left out.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union

from puna.errors import TrainingError

T = TypeVar("T")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def read_table(kind: type[T], raw: Mapping[str, Any], where: str = "", **made: Any) -> T:
    """The dataclass ``kind`` from a table that lies at ``where`` (``training.``); fields in ``made`` are made already.

    Raises TrainingError naming the field: for a key that there is none of, with the nearest that there is; for one that
    is missing; for a value of another type; and what the dataclass itself raises.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for key in raw:
        if key not in known:
            raise TrainingError(f"the recipe has no field {where}{key}; {_nearest_field(key, kind, where)}")
    for name, field in known.items():
        if name not in raw and name not in made and not _has_default(field):
            raise TrainingError(f"the recipe lacks {where}{name}; add it")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _read(hints[name], value, where + name) for name, value in raw.items()}, **made)


def nearest(name: str, names: Iterable[str]) -> str:
    """``did you mean …?``, or what there is."""
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else f"there are {', '.join(names) or 'none'}"


def write_table(value: Any) -> dict[str, Any]:
    """A dataclass as a plain table, without what is as its default says."""
    table = {}
    for field in fields(value):
        own = getattr(value, field.name)
        if own is not None and own != _default(field):
            table[field.name] = _plain(own)
    return table


def to_toml(table: Mapping[str, Any]) -> str:
    """A table as a TOML document: plain values first, then its tables."""
    return "\n".join(_lines(table, ())) + "\n"


def _nearest_field(key: str, kind: type, where: str) -> str:
    """Also in the tables below."""
    places = {place.rpartition(".")[2]: place for place in reversed(list(_places(kind, where)))}
    found = difflib.get_close_matches(key, places, n=1, cutoff=0.5)
    return f"did you mean {places[found[0]]}?" if found else nearest(key, [field.name for field in fields(kind)])


def _places(kind: type, where: str) -> Iterable[str]:
    """The names of all fields, those of a table before those of the tables in it."""
    hints = typing.get_type_hints(kind)
    yield from (where + name for name in hints)
    for name, hint in hints.items():
        if is_dataclass(hint):
            yield from _places(hint, f"{where}{name}.")  # type: ignore[arg-type]


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _read(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _read(hint, value, where)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            hint = nearest(value, arguments) if isinstance(value, str) else f"there are {', '.join(arguments)}"
            raise TrainingError(f"{where} is {value!r}; {hint}")
        return value
    if origin is tuple:
        return _read_list(arguments, value, where)
    if origin is not None:  # a mapping
        if not isinstance(value, Mapping):
            raise _wrong(where, "a table", value)
        return {key: _read(arguments[1], own, f"{where}.{key}") for key, own in value.items()}
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong(where, f"a table, [{where}]", value)
        return read_table(hint, value, f"{where}.")  # type: ignore[arg-type]
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise _wrong(where, _NAMES[hint], value)
    return value


def _read_list(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(where, "a list", value)
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise _wrong(where, f"a list of {len(arguments)}", value)
    return tuple(_read(arguments[0], item, f"{where}[{place}]") for place, item in enumerate(value))


def _wrong(where: str, expected: str, value: Any) -> TrainingError:
    return TrainingError(f"{where} must be {expected}, found {repr(value)[:100]}")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return write_table(value)
    if isinstance(value, Mapping):
        return {key: _plain(own) for key, own in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterable[str]:
    def is_tables(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)

    nested = {key for key, value in table.items() if not path and (isinstance(value, Mapping) or is_tables(value))}
    for key, value in table.items():
        if key not in nested:
            yield f"{_key(key)} = {_value(value)}"
    for key in table:
        if key in nested:
            several = is_tables(table[key])
            for one in table[key] if several else [table[key]]:
                yield ""
                yield f"[[{_key(key)}]]" if several else f"[{_key(key)}]"
                yield from _lines(one, (*path, key))


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(own)}" for key, own in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return repr(value)
