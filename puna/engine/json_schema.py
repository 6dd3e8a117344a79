"""JSON schemas before they are compiled: what cannot be enforced is refused by name and place, never ignored.

llguidance refuses most of what it lacks, but not all, and does not say where it is. What is only spelled in a way that
it does not read is rewritten. Sources: JSON Schema drafts 3 to 2020-12.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from puna.errors import RequestError

# Assertions of any draft that are not implemented. ``format`` is llguidance's to check: it refuses what it lacks.
UNSUPPORTED = frozenset(
    [
        "not",
        "if",
        "then",
        "else",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "propertyNames",
        "uniqueItems",
        "contains",
        "minContains",
        "maxContains",
        "unevaluatedItems",
        "unevaluatedProperties",
        "contentEncoding",
        "contentMediaType",
        "contentSchema",
        "$dynamicRef",
        "$recursiveRef",
        "divisibleBy",
        "extends",
        "disallow",
    ]
)
SIZES = frozenset(["minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"])
SCHEMA_KEYS = ("items", "additionalItems", "additionalProperties", "allOf", "anyOf", "oneOf", "prefixItems")
NAMED_SCHEMA_KEYS = ("properties", "patternProperties", "definitions", "$defs")


def enforceable(schema: Mapping[str, Any] | bool | str) -> str:
    """The schema (or its text) as JSON text that llguidance reads. Raises RequestError naming keyword and place."""
    try:
        root = json.loads(schema if isinstance(schema, str) else json.dumps(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema is not JSON: {error}") from None
    if root is False:
        raise RequestError("the JSON schema is false, which allows no text at all")
    if root is True:
        root = {}
    if not isinstance(root, dict):
        raise RequestError(f"the JSON schema must be an object or true, found {type(root).__name__}")
    pending: list[tuple[str, Any]] = [("#", root)]
    seen = set()
    while pending:
        place, node = pending.pop()
        if isinstance(node, dict) and id(node) not in seen:
            seen.add(id(node))
            _drop_what_says_nothing(node)
            _check(place, node)
            pending += _parts(place, node)
            target = _target(root, node.get("$ref"))
            if target is not None:
                pending.append((node["$ref"], target))
    return json.dumps(root)


def _drop_what_says_nothing(node: dict[str, Any]) -> None:
    if node.get("uniqueItems") is False:
        del node["uniqueItems"]
    if "if" not in node or not ("then" in node or "else" in node):
        for key in ("if", "then", "else"):
            node.pop(key, None)
    for key in SIZES & node.keys():
        if isinstance(node[key], float) and node[key].is_integer():
            node[key] = int(node[key])


def _check(place: str, node: dict[str, Any]) -> None:
    found = sorted(UNSUPPORTED & node.keys())
    if found:
        raise RequestError(f"the JSON schema uses {found[0]!r} at {place}, which cannot be enforced; remove it")
    if "$ref" in node and "$id" in node and place != "#":
        raise RequestError(f"the JSON schema has '$id' beside '$ref' at {place}, which drafts read differently")


def _parts(place: str, node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside one, and where they are (JSON pointers)."""
    for key in SCHEMA_KEYS:
        part = node.get(key)
        if isinstance(part, list):
            yield from ((f"{place}/{key}/{i}", item) for i, item in enumerate(part))
        else:
            yield f"{place}/{key}", part
    for key in NAMED_SCHEMA_KEYS:
        part = node.get(key)
        if isinstance(part, dict):
            yield from ((f"{place}/{key}/{_escape(name)}", item) for name, item in part.items())


def _target(root: Any, reference: Any) -> Any:
    """What a reference within the document points to (RFC 6901); None for any other."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    node = root
    for name in reference[2:].split("/"):
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and name.isascii() and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict):
            node = node.get(name)
        else:
            return None
    return node


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
