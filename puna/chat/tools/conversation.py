"""Conversations with tools, in the shape that a model's template can show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from puna.chat.messages import Message
from puna.chat.tools.formats import CLOSE_TAG, OPEN_TAG, ToolFormat
from puna.chat.tools.tool import Tool

BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", "code_interpreter")
_RESULT_ROLES = ("tool", "ipython")

_INTRODUCTION = """\
You can call functions to help the user. Each line between the tools tags is a function: its name, what it does, and \
the JSON schema of its parameters.
<tools>
{tools}
</tools>

"""
_HOW_TO_CALL = {
    "tags": """\
To call functions, answer with a JSON list of the calls between tool_call tags and nothing else, in this form:
<tool_call>[{"name": "function_name", "arguments": {"parameter": "value"}}]</tool_call>
""",
    "llama_json": """\
To call a function, answer with one JSON object and nothing else, in this form:
{"name": "function_name", "parameters": {"parameter": "value"}}
""",
    "pythonic": """\
To call functions, answer with a list of the calls and nothing else, in this form:
[function_name(parameter="value", other_parameter=1), other_function()]
""",
}
_WHEN_TO_CALL = """\
Call only functions that are listed, with the parameters that they have. When no function helps, answer in plain \
words. When the value of a required parameter is not known, ask for it."""


@dataclass(frozen=True)
class ToolConversation:
    """What to hand to ``render_prompt``: ``messages``, ``tools``, and further ``variables`` of the template."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)


def tool_conversation(tool_format: ToolFormat, messages: Sequence[Message], tools: Sequence[Tool]) -> ToolConversation:
    """Show the tools, the calls made so far and their results to the model, by its template where that can.

    Where the template passes over tools, a system text describes them; where it passes over calls, they become text
    in the form that the model is asked to write, and results become messages that every template takes. A template
    that takes one call in a message gets each call with its result in turn. Llama 3.1's built-in tools, known by their
    names, are switched on instead of described.
    """
    variables: dict[str, Any] = {}
    if not tool_format.template_shows_calls:
        shown = _calls_as_text(tool_format, messages)
    else:
        shown = [replace(message, content=message.content or "") for message in messages]
        if not tool_format.template_shows_parallel_calls:
            shown = _one_call_each(shown)
    if tool_format.template_builtins:
        builtin = [tool.name for tool in tools if tool.name in BUILTIN_TOOLS]
        tools = [tool for tool in tools if tool.name not in builtin]
        if builtin:
            variables["builtin_tools"] = builtin
            shown = [_with_text_arguments(message, builtin) for message in shown]
    if not tools:
        return ToolConversation(shown, None, variables)
    if not tool_format.template_shows_tools:
        return ToolConversation(_with_tools_described(tool_format, shown, tools), None, variables)
    return ToolConversation(shown, [tool.to_dict() for tool in tools], variables)


def _with_tools_described(tool_format: ToolFormat, messages: list[Message], tools: Sequence[Tool]) -> list[Message]:
    lines = "\n".join(json.dumps(tool.to_dict()["function"], ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools=lines) + _HOW_TO_CALL[tool_format.style] + _WHEN_TO_CALL
    if messages and messages[0].role in ("system", "developer"):
        first, *rest = messages
        return [replace(first, content=f"{first.text}\n\n{text}" if first.text else text), *rest]
    return [Message("system", text), *messages]


def _calls_as_text(tool_format: ToolFormat, messages: Sequence[Message]) -> list[Message]:
    """Neighbouring results, and what the user says next, become one message: some templates insist on alternation."""
    tags = tool_format.style == "tags"
    shown: list[Message] = []
    after_result = False
    for message in messages:
        is_result = message.role in _RESULT_ROLES
        if message.tool_calls:
            parts = [message.text, _written(tool_format, message.tool_calls)]
            shown.append(Message("assistant", "\n".join(filter(None, parts))))
        elif is_result and not tags:
            shown.append(Message("ipython", message.text))
        elif tags and (is_result or (after_result and message.role == "user")):
            text = f"<tool_response>\n{message.text}\n</tool_response>" if is_result else message.text
            if after_result:
                shown[-1] = Message("user", f"{shown[-1].text}\n{text}")
            else:
                shown.append(Message("user", text))
        else:
            shown.append(message)
        after_result = is_result
    return shown


def _written(tool_format: ToolFormat, calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls as the model would have written them."""
    functions = [call["function"] for call in calls]
    if tool_format.style == "tags":
        listed = [{"name": each["name"], "arguments": each.get("arguments", {})} for each in functions]
        return OPEN_TAG + json.dumps(listed, ensure_ascii=False) + CLOSE_TAG
    objects = [{"name": each["name"], "parameters": each.get("arguments", {})} for each in functions]
    return "; ".join(json.dumps(each, ensure_ascii=False) for each in objects)


def _one_call_each(messages: Sequence[Message]) -> list[Message]:
    """Messages of several calls, and the results that follow, taken apart: a call, its result, the next call, …"""
    shown: list[Message] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        if len(message.tool_calls) < 2:
            shown.append(message)
            continue
        results: list[Message] = []
        while rest and rest[0].role in _RESULT_ROLES:
            results.append(rest.pop(0))
        content = message.content
        for call in message.tool_calls:
            shown.append(replace(message, content=content, tool_calls=(call,)))
            content = ""
            answer = _answer_to(call, results)
            if answer is not None:
                results.remove(answer)
                shown.append(answer)
        shown += results
    return shown


def _answer_to(call: Mapping[str, Any], results: Sequence[Message]) -> Message | None:
    """By its id; without ids, the first that is left."""
    by_id = (result for result in results if result.tool_call_id is not None and result.tool_call_id == call.get("id"))
    unnamed = (result for result in results if result.tool_call_id is None)
    return next(by_id, next(unnamed, None))


def _with_text_arguments(message: Message, builtin: Sequence[str]) -> Message:
    """Llama 3.1's template writes a built-in tool's arguments between quotes, so they must be text."""
    calls = []
    for call in message.tool_calls:
        function = call["function"]
        arguments = function.get("arguments")
        if function["name"] in builtin and isinstance(arguments, Mapping):
            texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
            call = {**call, "function": {**function, "arguments": texts}}
        calls.append(call)
    return replace(message, tool_calls=tuple(calls))
