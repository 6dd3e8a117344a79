"""From the body of a request to what is asked of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from puna.chat.messages import Message
from puna.errors import RequestError
from puna.server.anthropic.fields import (
    CountRequest,
    InputMessage,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
    UnsupportedBlock,
)
from puna.server.asking import ChatAsk
from puna.server.manager import ServedModel

# What the API documents, where neither the request nor the model's own defaults say anything.
_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def messages_ask(body: MessagesRequest, model: ServedModel, tenant: str) -> ChatAsk:
    """Raises RequestError naming the field."""
    given = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "stop": body.stop_sequences,
        "max_tokens": body.max_tokens,
    }
    defaults = {name: value for name, value in _DEFAULTS.items() if name not in model.llm.defaults}
    chosen = {name: value for name, value in given.items() if value is not None}
    return _ask(body, model, tenant, {**defaults, **chosen})


def count_ask(body: CountRequest, model: ServedModel, tenant: str) -> ChatAsk:
    """What the same body would ask of /v1/messages, to count its prompt. Raises RequestError naming the field."""
    return _ask(body, model, tenant, {})


def _ask(body: CountRequest, model: ServedModel, tenant: str, sampling: dict[str, Any]) -> ChatAsk:
    choice, parallel = _tool_choice(body)
    output = body.output_config
    return ChatAsk(
        sampling=model.llm.sampling(**sampling),
        constraint=model.llm.constraints.json_schema(output.format.schema_) if output and output.format else None,
        tenant=tenant,
        messages=_conversation(body),
        tools=[_tool(tool, f"tools.{i}") for i, tool in enumerate(body.tools)],
        tool_choice=choice,
        parallel_tool_calls=parallel,
        think={"enabled": True, "disabled": False}.get(body.thinking.type) if body.thinking else None,
        add_generation_prompt=body.messages[-1].role != "assistant",
        continue_final_message=body.messages[-1].role == "assistant",
    )


def _conversation(body: CountRequest) -> list[Message]:
    found = [Message("system", "\n".join(block.text for block in body.system))] if body.system else []
    names: dict[str, str] = {}  # of the tool that each call's id is for
    for i, message in enumerate(body.messages):
        where = f"messages.{i}.content"
        if message.role == "assistant":
            found.append(_assistant(message, where, names))
        elif message.role == "user":
            found += _user(message, where, names)
        else:
            found.append(Message("system", _text(message.content, where, "a system's")))
    return found


def _user(message: InputMessage, where: str, names: dict[str, str]) -> list[Message]:
    """Results of tools are messages of their own, before what the user says."""
    found, texts = [], []
    for i, block in enumerate(message.content):
        place = f"{where}.{i}"
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in names:
                raise RequestError(f"{place}.tool_use_id {block.tool_use_id!r} belongs to no tool_use block before it")
            text = ("Error: " if block.is_error else "") + _text(block.content, f"{place}.content", "a tool's")
            found.append(Message("tool", text, tool_call_id=block.tool_use_id, name=names[block.tool_use_id]))
        elif isinstance(block, TextBlock):
            texts.append(block.text)
        else:
            raise _misplaced(block, place, "a user's")
    if texts or not found:
        found.append(Message("user", "\n".join(texts)))
    return found


def _assistant(message: InputMessage, where: str, names: dict[str, str]) -> Message:
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(message.content):
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            names[block.id] = block.name
            function = {"name": block.name, "arguments": block.input}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, (ToolResultBlock, UnsupportedBlock)):
            raise _misplaced(block, f"{where}.{i}", "an assistant's")
    text = "\n".join(texts)
    return Message("assistant", text, tuple(calls), reasoning_content="\n".join(thoughts) or None)


def _text(blocks: Sequence[Any], where: str, whose: str) -> str:
    """The text of blocks that must all be text."""
    for i, block in enumerate(blocks):
        if not isinstance(block, TextBlock):
            raise _misplaced(block, f"{where}.{i}", whose)
    return "\n".join(block.text for block in blocks)


def _misplaced(block: Any, where: str, whose: str) -> RequestError:
    if isinstance(block, UnsupportedBlock):
        return RequestError(f"{where} is of type {block.type}, which is not supported; send text instead")
    return RequestError(f"{where} is of type {block.type}, which {whose} message can't hold")


def _tool(tool: Tool, where: str) -> dict[str, Any]:
    """As templates expect a tool."""
    if tool.type not in (None, "custom"):
        raise RequestError(f"{where}.type {tool.type!r} is a tool that Anthropic defines; only custom tools work here")
    if tool.input_schema is None:
        raise RequestError(f"{where}.input_schema is missing")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _tool_choice(body: CountRequest) -> tuple[str, bool]:
    """The choice in Puna's terms, and whether there may be several calls."""
    choice = body.tool_choice
    if choice is None:
        return "auto", True
    if choice.type in ("any", "tool") and not body.tools:
        raise RequestError(f"tool_choice is {choice.type}, but there are no tools")
    parallel = not choice.disable_parallel_tool_use
    if choice.type != "tool":
        return _TOOL_CHOICES[choice.type], parallel
    if choice.name not in [tool.name for tool in body.tools]:
        raise RequestError(f"tool_choice.name {choice.name!r} is none of the tools")
    return choice.name, parallel
