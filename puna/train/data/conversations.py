"""Messages as data sets spell them: OpenAI's ``role`` and ``content``, ShareGPT's ``from`` and ``value``.

Sources: OpenAI's fine-tuning format (``weight`` says whether an assistant message is learnt); the data formats of
LLaMA-Factory (``function_call`` and ``observation`` are a call and its result).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from puna.chat.messages import Message
from puna.chat.tools import check_tools
from puna.errors import DataError, RequestError
from puna.train.data.examples import Conversation

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "ipython": "ipython",
    "function_call": "function_call",
}
_ROLE_FIELDS = ("role", "from")
_CONTENT_FIELDS = ("content", "value")


@dataclass(frozen=True)
class Turn:
    """A message, and whether it is to be learnt."""

    message: Message
    trained: bool


def parse_turns(raw: Any, field: str) -> list[Turn]:
    """The messages of a row's ``field``. Raises DataError naming the message and its field."""
    if isinstance(raw, Mapping):
        raw = [raw]
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)) or not raw:
        found = "an empty list" if isinstance(raw, Sequence) and not raw else type(raw).__name__
        raise DataError(f"{field} must be a list of messages, found {found}")
    return [_parse_turn(message, f"{field}[{i}]") for i, message in enumerate(raw)]


def conversation(turns: Sequence[Turn], tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    """Raises DataError when no assistant message is there to learn."""
    trained = tuple(i for i, turn in enumerate(turns) if turn.trained)
    if not trained:
        raise DataError("the conversation holds no assistant message to learn; end it with one")
    return Conversation(tuple(turn.message for turn in turns), trained, tools)


def parse_tools(raw: Any, field: str = "tools") -> tuple[dict[str, Any], ...]:
    """A row's tools, in OpenAI's shape or as bare functions, as a list or as its JSON text. Raises DataError."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw) if raw.strip() else []
        except (ValueError, RecursionError):
            raise DataError(
                f"{field} must be a list of tools, or that list as JSON text; the text is not JSON"
            ) from None
    if raw is None:
        return ()
    wrapped = [
        {"type": "function", "function": tool} if isinstance(tool, Mapping) and "function" not in tool else tool
        for tool in (raw if isinstance(raw, Sequence) else [raw])
    ]
    try:
        return tuple(tool.to_dict() for tool in check_tools(wrapped, field))
    except RequestError as error:
        raise DataError(str(error)) from None


def text_of(row: Mapping[str, Any], field: str, *, optional: bool = False) -> str:
    """A field that must be text; empty when it is optional and absent. Raises DataError."""
    value = row.get(field)
    if value is None and optional:
        return ""
    if value is None:
        raise DataError(f"the field {field} is missing")
    if not isinstance(value, str):
        raise DataError(f"{field} must be text, found {type(value).__name__}")
    return value


def _parse_turn(raw: Any, where: str) -> Turn:
    if not isinstance(raw, Mapping):
        raise DataError(f"{where} must be an object with a role and a content, found {type(raw).__name__}")
    fields = {key: value for key, value in raw.items() if value is not None}
    role_field = next((name for name in _ROLE_FIELDS if name in fields), None)
    if role_field is None:
        raise DataError(f"{where} says not who speaks; give its role (or from)")
    role = fields.pop(role_field)
    known = _ROLES.get(role) if isinstance(role, str) else None
    if known is None:
        raise DataError(f"{where}.{role_field} must be one of {', '.join(_ROLES)}, found {role!r}")
    content_field = next((name for name in _CONTENT_FIELDS if name in fields), "content")
    content = fields.pop(content_field, None)
    weight = fields.pop("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{where}.weight must be 0 or 1, found {weight!r}")
    if known == "function_call":
        fields["tool_calls"] = _calls(content, f"{where}.{content_field}")
        known, content = "assistant", None
    try:
        message = Message.from_dict({**fields, "role": known, "content": content})
    except RequestError as error:
        raise DataError(str(error).replace("messages[0]", where, 1)) from None
    return Turn(message, known == "assistant" and weight == 1)


def _calls(text: Any, where: str) -> list[dict[str, Any]]:
    """ShareGPT's calls: JSON text of one ``{"name", "arguments"}`` or of a list of them."""
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        raise DataError(
            f'{where} must be a call as JSON text, {{"name": …, "arguments": {{…}}}}; it is not JSON'
        ) from None
    calls = found if isinstance(found, list) else [found]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise DataError(
                f'{where} must be a call as JSON text, {{"name": …, "arguments": {{…}}}}, found {call!r:.80}'
            )
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]
