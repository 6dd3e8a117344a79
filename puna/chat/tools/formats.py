"""How a model writes tool calls, told from its template and its vocabulary.

Sources: the prompt formats that Meta publishes for Llama 3.1, 3.2, 3.3 and 4; the templates in the models' files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from puna.chat.template import Template
from puna.errors import TemplateError

PYTHON_TAG = "<|python_tag|>"
OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"

# As in "[func_name1(params_name1=params_value1, …)]" of Meta's prompts for Llama 3.2 and 4.
_PYTHONIC = re.compile(r"\[\s*func\w*\(")
_NAMES = ("probe_first_71", "probe_second_72")
_RESULT = "probe_result_73"


class Vocabulary(Protocol):
    """The part of a tokenizer that is looked at; puna.tokenizer.Tokenizer has it."""

    @property
    def special_tokens(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class ToolFormat:
    """How one model is told of tools, and how it writes calls.

    ``style`` is what the model is asked to write:

    - ``llama_json``: ``{"name": …, "parameters": {…}}``, with ``<|python_tag|>`` before it or without;
    - ``pythonic``: ``[name(key=value), …]``;
    - ``tags``: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, with one call or a list of them.

    ``visible_special_tokens`` are the control tokens, and their ids, that the reader of calls must see as text. The
    ``template_shows_…`` say what the template does on its own; what it doesn't, ``tool_conversation`` makes up for.
    ``template_builtins``: it knows Llama 3.1's built-in tools.
    """

    style: Literal["llama_json", "pythonic", "tags"]
    visible_special_tokens: Mapping[str, int]
    template_shows_tools: bool
    template_shows_calls: bool
    template_shows_parallel_calls: bool
    template_builtins: bool


def tool_format(template: Template, tokenizer: Vocabulary) -> ToolFormat:
    """The format of a model with that template.

    What the template makes of tools, calls and results is tried out, for naming them is not showing them.
    """
    template_source, special = template.source, tokenizer.special_tokens
    shows_tools = _shows_tools(template)
    style: Literal["llama_json", "pythonic", "tags"]
    if shows_tools and OPEN_TAG in template_source:
        style = "tags"
    elif shows_tools and _PYTHONIC.search(template_source):
        style = "pythonic"
    elif shows_tools or PYTHON_TAG in special:
        style = "llama_json"
    else:
        style = "pythonic" if "<|python_start|>" in special else "tags"
    markers = (OPEN_TAG, CLOSE_TAG) if style == "tags" else (PYTHON_TAG,)
    return ToolFormat(
        style,
        {marker: special[marker] for marker in markers if marker in special},
        shows_tools,
        shows_tools and _shows_calls(template, 1),
        shows_tools and _shows_calls(template, 2),
        shows_tools and "builtin_tools" in template_source,
    )


def _shows_tools(template: Template) -> bool:
    return _NAMES[0] in _try(template, [{"role": "user", "content": "hi"}])


def _shows_calls(template: Template, number: int) -> bool:
    functions = [{"name": name, "arguments": {"key": f"{name}_value"}} for name in _NAMES[:number]]
    calls = [{"id": f"call_{i}", "type": "function", "function": call} for i, call in enumerate(functions)]
    answers = [
        {"role": "tool", "tool_call_id": f"call_{i}", "name": call["name"], "content": f"{_RESULT}_{i}"}
        for i, call in enumerate(functions)
    ]
    text = _try(
        template,
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": calls}, *answers],
    )
    shown = [f"{name}_value" in text and f"{_RESULT}_{i}" in text for i, name in enumerate(_NAMES[:number])]
    return all(shown)


def _try(template: Template, messages: list[dict[str, Any]]) -> str:
    """The rendered text; empty when the template rejects the conversation."""
    schema = {"type": "object", "properties": {"key": {"type": "string", "description": "a key"}}}
    function = {"name": _NAMES[0], "description": "a probe", "parameters": schema}
    try:
        return template.render(messages, tools=[{"type": "function", "function": function}])
    except TemplateError:
        return ""
