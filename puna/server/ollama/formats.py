"""The field ``format``: what an answer must look like."""

from __future__ import annotations

import asyncio
from typing import Any

from puna.engine import Constraint
from puna.errors import RequestError
from puna.server.manager import ServedModel

# Under these, a narrower part can make a whole that is wider, or that nothing fits.
_COMPOSED = {"allOf", "oneOf", "not", "if", "dependentSchemas", "unevaluatedProperties", "$dynamicRef"}
_OPENING = {"additionalProperties", "patternProperties", "$ref", "const", "enum"}
_BY_NAME = ("properties", "$defs", "definitions")
_LISTED = ("anyOf", "prefixItems")


async def constraint_of(model: ServedModel, wanted: str | dict[str, Any] | None) -> Constraint | None:
    """``json``, or a JSON schema; None and an empty text want nothing. Raises RequestError for what can't be done."""
    if wanted is None or wanted == "":
        return None
    # The first time, this goes over the whole vocabulary.
    compiler = await asyncio.to_thread(lambda: model.llm.constraints)
    if isinstance(wanted, str):
        return await asyncio.to_thread(compiler.json_object)
    try:
        schema = wanted if _mentions(wanted, _COMPOSED) else closed(wanted)
    except RecursionError:
        raise RequestError("format: the JSON schema is nested too deeply") from None
    return await asyncio.to_thread(compiler.json_schema, schema)


def closed(schema: Any) -> Any:
    """The schema with objects that have only the properties they name, as ollama's grammars do.

    What fits it fits the original. Without this, a small model may go on inventing properties until its context is
    full, because most schemas (pydantic's too) do not say ``additionalProperties: false``.
    """
    if not isinstance(schema, dict):
        return schema
    inner = dict(schema)
    for key in _BY_NAME:
        if isinstance(inner.get(key), dict):
            inner[key] = {name: closed(part) for name, part in inner[key].items()}
    for key in _LISTED:
        if isinstance(inner.get(key), list):
            inner[key] = [closed(part) for part in inner[key]]
    if "items" in inner:
        inner["items"] = closed(inner["items"])
    properties, required = inner.get("properties"), inner.get("required", [])
    if isinstance(properties, dict) and isinstance(required, list) and not _OPENING & inner.keys():
        names = [name for name in required if isinstance(name, str)]
        if properties and all(name in properties for name in names):
            inner["additionalProperties"] = False
    return inner


def _mentions(value: Any, keys: set[str]) -> bool:
    if isinstance(value, dict):
        return bool(keys & value.keys()) or any(_mentions(part, keys) for part in value.values())
    return isinstance(value, list) and any(_mentions(part, keys) for part in value)
