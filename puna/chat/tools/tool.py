"""Tools as clients describe them, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from puna.errors import RequestError

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. ``parameters`` is the JSON schema of its arguments, an object.

    ``strict`` asks that the arguments fit the schema also where the model is free not to call.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def to_dict(self) -> dict[str, Any]:
        """In OpenAI's shape, which templates expect, with every field that one may ask for."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model must call: ``none`` (it must not), ``auto``, or ``required``; then perhaps a tool by name."""

    mode: Literal["none", "auto", "required"] = "auto"
    name: str | None = None


def check_tools(raw: Any, where: str = "tools") -> list[Tool]:
    """Tools in OpenAI's shape: ``{"type": "function", "function": {"name", "description", "parameters", "strict"}}``.

    Raises RequestError naming the field.
    """
    if raw is None:
        return []
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)):
        raise RequestError(f"{where} must be a list of tools, found {type(raw).__name__}")
    if len(raw) > MAX_TOOLS:
        raise RequestError(f"{where} holds {len(raw)} tools, more than {MAX_TOOLS}")
    tools = [_check_tool(tool, f"{where}[{i}]") for i, tool in enumerate(raw)]
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in seen:
            raise RequestError(f"{where}[{i}].function.name {tool.name!r} is there twice; names must differ")
        seen.add(tool.name)
    return tools


def check_tool_choice(raw: Any, tools: Sequence[Tool], where: str = "tool_choice") -> ToolChoice:
    """OpenAI's ``none``, ``auto``, ``required``, or ``{"type": "function", "function": {"name"}}``.

    None means ``auto``, or ``none`` without tools. Raises RequestError.
    """
    if raw is None:
        return ToolChoice("auto" if tools else "none")
    if raw == "none":
        return ToolChoice("none")
    if not tools:
        raise RequestError(f"{where} is given without tools; name the tools in the field tools")
    if raw == "auto":
        return ToolChoice("auto")
    if raw == "required":
        return ToolChoice("required")
    function = raw.get("function") if isinstance(raw, Mapping) and raw.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            f"{where} must be none, auto, required, or {{'type': 'function', 'function': {{'name': …}}}}, found {raw!r}"
        )
    if all(tool.name != name for tool in tools):
        raise RequestError(f"{where} names {name!r}, which is not among the tools")
    return ToolChoice("required", name)


def from_anthropic(raw: Any) -> Any:
    """A tool of Anthropic's Messages API in OpenAI's shape, unchecked."""
    if not isinstance(raw, Mapping):
        return raw
    function = {key: value for key, value in raw.items() if key in ("name", "description", "strict")}
    return {"type": "function", "function": {**function, "parameters": raw.get("input_schema")}}


def from_ollama(raw: Any) -> Any:
    """A tool of ollama's API in OpenAI's shape, unchecked: its ``type`` may be absent."""
    return {"type": "function", **raw} if isinstance(raw, Mapping) else raw


def _check_tool(raw: Any, where: str) -> Tool:
    if not isinstance(raw, Mapping):
        raise RequestError(f"{where} must be an object, found {type(raw).__name__}")
    if raw.get("type") != "function":
        raise RequestError(f"{where}.type must be 'function', found {raw.get('type')!r}")
    function = raw.get("function")
    if not isinstance(function, Mapping):
        raise RequestError(f"{where}.function must be an object with a name, found {type(function).__name__}")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"{where}.function.name must be 1 to 64 letters, digits, underscores, dots or dashes, found {name!r}"
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{where}.function.description must be text, found {type(description).__name__}")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{where}.function.strict must be true or false, found {strict!r}")
    parameters = _check_parameters(function.get("parameters"), f"{where}.function.parameters")
    return Tool(name, description or "", parameters, bool(strict))


def _check_parameters(raw: Any, where: str) -> dict[str, Any]:
    if raw is None:
        return {"type": "object", "properties": {}}
    if not isinstance(raw, Mapping):
        raise RequestError(f"{where} must be a JSON schema, found {type(raw).__name__}")
    if raw.get("type", "object") != "object":
        raise RequestError(f"{where}.type must be 'object': arguments have names; found {raw['type']!r}")
    properties = raw.get("properties")
    if properties is not None and not isinstance(properties, Mapping):
        raise RequestError(f"{where}.properties must be an object, found {type(properties).__name__}")
    required = raw.get("required")
    if required is not None and not (isinstance(required, list) and all(isinstance(name, str) for name in required)):
        raise RequestError(f"{where}.required must be a list of names, found {required!r}")
    try:
        json.dumps(raw)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from None
    # Some clients send null for what they leave out.
    given = {key: value for key, value in raw.items() if value is not None}
    return {"type": "object", "properties": {}, **given}
