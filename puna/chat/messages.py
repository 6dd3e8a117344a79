"""Chat messages: what users hand in, checked and made plain before a template sees it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puna.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    ``content`` is text, a list of parts such as ``{"type": "text", "text": …}``, or None for an assistant that only
    calls tools. ``tool_calls`` are ``{"id", "type": "function", "function": {"name", "arguments"}}``; arguments that
    arrive as JSON text, as OpenAI's clients send them, become the object that templates expect. ``tool_call_id`` and
    ``name`` say what a ``tool`` message answers.
    """

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    reasoning_content: str | None = None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], position: int = 0) -> Message:
        """From a plain dictionary. Raises RequestError naming ``messages[position]`` and the field."""
        where = f"messages[{position}]"
        if not isinstance(raw, Mapping):
            raise RequestError(f"{where} must be an object with a role and a content, found {type(raw).__name__}")
        unknown = sorted(str(key) for key in raw if key not in _FIELDS)
        if unknown:
            raise RequestError(f"{where} has the unknown field {unknown[0]!r}; known: {', '.join(_FIELDS)}")
        role = raw.get("role")
        if role not in ROLES:
            raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, found {role!r}")
        calls = _tool_calls(raw.get("tool_calls"), f"{where}.tool_calls")
        content = _content(raw.get("content"), f"{where}.content")
        if content is None and not calls:
            raise RequestError(f"{where}.content is missing")
        for field in ("tool_call_id", "name", "reasoning_content"):
            if raw.get(field) is not None and not isinstance(raw[field], str):
                raise RequestError(f"{where}.{field} must be text, found {type(raw[field]).__name__}")
        return cls(role, content, calls, raw.get("tool_call_id"), raw.get("name"), raw.get("reasoning_content"))

    def to_dict(self) -> dict[str, Any]:
        """As templates expect it: fields that were not given are absent, ``content`` is always there."""
        raw: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            raw["tool_calls"] = list(self.tool_calls)
        for field in ("tool_call_id", "name", "reasoning_content"):
            if getattr(self, field) is not None:
                raw[field] = getattr(self, field)
        return raw

    @property
    def text(self) -> str:
        """The text of the content, parts joined; empty when there is none."""
        if isinstance(self.content, list):
            return "".join(part["text"] for part in self.content if part["type"] == "text")
        return self.content or ""


def parse_messages(messages: Sequence[Message | Mapping[str, Any]]) -> list[Message]:
    """Check a conversation. Raises RequestError naming the message and the field."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of messages, found {type(messages).__name__}")
    if not messages:
        raise RequestError("messages is empty; a conversation needs at least one message")
    raw = [message.to_dict() if isinstance(message, Message) else message for message in messages]
    return [Message.from_dict(message, i) for i, message in enumerate(raw)]


def _content(raw: Any, where: str) -> str | list[dict[str, Any]] | None:
    if raw is None or isinstance(raw, str):
        return raw
    if not isinstance(raw, Sequence) or isinstance(raw, bytes):
        raise RequestError(f"{where} must be text or a list of parts, found {type(raw).__name__}")
    parts = []
    for i, part in enumerate(raw):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise RequestError(f"{where}[{i}] must be an object with a type, such as {{'type': 'text', 'text': …}}")
        if part["type"] != "text":
            raise RequestError(f"{where}[{i}].type {part['type']!r} is not supported; this version takes text only")
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{i}].text must be text, found {type(part.get('text')).__name__}")
        parts.append({"type": "text", "text": part["text"]})
    return parts


def _tool_calls(raw: Any, where: str) -> tuple[dict[str, Any], ...]:
    if raw is None:
        return ()
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)):
        raise RequestError(f"{where} must be a list, found {type(raw).__name__}")
    calls = []
    for i, call in enumerate(raw):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{i}] must be an object with function.name and function.arguments")
        if not isinstance(function.get("arguments", {}), (Mapping, str)):
            raise RequestError(f"{where}[{i}].function.arguments must be an object or JSON text")
        calls.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments", {}))}})
    return tuple(calls)


def _arguments(raw: Mapping[str, Any] | str) -> Mapping[str, Any] | str:
    """Text that is not a JSON object stays text: a model wrote it, and its words are shown back to it."""
    if isinstance(raw, str):
        try:
            parsed = json.loads(raw)
        except (ValueError, RecursionError):
            return raw
        return parsed if isinstance(parsed, dict) else raw
    return dict(raw)
