"""The items of a conversation: from a request to what is stored, and from there to messages for a model."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from puna.chat.messages import Message
from puna.server.http_errors import FieldError
from puna.server.openai.response_fields import (
    FunctionCallItem,
    FunctionCallOutputItem,
    Item,
    MessageItem,
    Other,
    Part,
    ReasoningItem,
    RefusalPart,
)

PlainItem = dict[str, Any]
_REMEDIES = {"item_reference": "; send the item itself, or previous_response_id"}


def item_id(kind: str) -> str:
    """A new id of an item: ``kind`` is msg, rs, fc or fco."""
    return f"{kind}_{secrets.token_hex(16)}"


def plain_items(given: str | Sequence[Item]) -> list[PlainItem]:
    """A request's input as it is stored and shown again, every item with an id. Raises FieldError."""
    if isinstance(given, str):
        given = [MessageItem.model_validate({"role": "user", "content": given})]
    return [_plain(item, f"input.{i}") for i, item in enumerate(given)]


def messages_of(items: Sequence[PlainItem]) -> list[Message]:
    """The messages of stored items: what an assistant thinks, says and calls in a row is one. Raises FieldError."""
    messages: list[Message] = []
    draft = _Assistant()
    names: dict[str, str] = {}
    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            draft = draft.begin(messages) if draft.spoke else draft
            draft.thoughts += [part["text"] for part in item.get("content") or ()]
        elif kind == "function_call":
            names[item["call_id"]] = item["name"]
            function = {"name": item["name"], "arguments": item["arguments"]}
            draft.calls.append({"id": item["call_id"], "type": "function", "function": function})
        elif kind == "message" and item["role"] == "assistant":
            draft = draft.begin(messages) if draft.spoke else draft
            draft.text = _text(item["content"])
        else:
            draft = draft.begin(messages)
            if kind == "message":
                messages.append(Message(item["role"], _text(item["content"])))
            else:
                messages.append(_result(item, names))
    draft.begin(messages)
    return messages


@dataclass
class _Assistant:
    """A message of an assistant that is being put together."""

    text: str | None = None
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def spoke(self) -> bool:
        return self.text is not None or bool(self.calls)

    def begin(self, messages: list[Message]) -> _Assistant:
        """The next one; this one is added to the messages, if there is anything in it."""
        if self.spoke or self.thoughts:
            thoughts = "\n".join(self.thoughts) or None
            messages.append(Message("assistant", self.text or "", tuple(self.calls), reasoning_content=thoughts))
        return _Assistant()


def _result(item: PlainItem, names: dict[str, str]) -> Message:
    call_id = item["call_id"]
    if call_id not in names:
        raise FieldError(
            f"input: the function_call_output of {call_id!r} belongs to no function_call before it", "input"
        )
    output = item["output"]
    text = output if isinstance(output, str) else _text(output)
    return Message("tool", text, tool_call_id=call_id, name=names[call_id])


def _text(parts: Sequence[dict[str, Any]]) -> str:
    return "".join(part["refusal" if part["type"] == "refusal" else "text"] for part in parts)


def _plain(item: Item, where: str) -> PlainItem:
    if isinstance(item, Other):
        remedy = _REMEDIES.get(item.type, "")
        raise FieldError(f"{where}: an item of type {item.type!r} is not supported{remedy}", where)
    if isinstance(item, MessageItem):
        kind = "output_text" if item.role == "assistant" else "input_text"
        content = _parts(item.content, kind, f"{where}.content")
        plain: PlainItem = {"type": "message", "id": item.id or item_id("msg"), "role": item.role, "content": content}
    elif isinstance(item, FunctionCallItem):
        call = {"call_id": item.call_id, "name": item.name, "arguments": item.arguments}
        plain = {"type": "function_call", "id": item.id or item_id("fc"), **call}
    elif isinstance(item, FunctionCallOutputItem):
        output = item.output if isinstance(item.output, str) else _parts(item.output, "input_text", f"{where}.output")
        plain = {"type": "function_call_output", "id": item.id or item_id("fco"), "call_id": item.call_id}
        plain["output"] = output
    else:
        assert isinstance(item, ReasoningItem)
        content = [{"type": "reasoning_text", "text": part.text} for part in item.content or ()]
        plain = {"type": "reasoning", "id": item.id or item_id("rs"), "summary": [], "content": content}
    return {**plain, "status": item.status or "completed"}


def _parts(content: str | Sequence[Part], kind: str, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [_text_part(kind, content)]
    parts = []
    for i, part in enumerate(content):
        if isinstance(part, Other):
            place = f"{where}.{i}"
            raise FieldError(f"{place}: a part of type {part.type} can't be read: this model takes text only", place)
        if isinstance(part, RefusalPart):
            parts.append({"type": "refusal", "refusal": part.refusal})
        else:
            parts.append(_text_part(kind, part.text))
    return parts


def _text_part(kind: str, text: str) -> dict[str, Any]:
    more: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": text, **more}
