"""Chat templates in Go's template language, as ollama's models carry them, with ollama's variables and rules.

Sources: the documentation of Go's text/template and of ollama's templates, and how ollama renders them. What differs
here is told in docs/modelfile.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from puna.chat.gotemplate.functions import FUNCTIONS, SHORT_CIRCUIT
from puna.chat.gotemplate.nodes import (
    Action,
    Body,
    Branch,
    Call,
    Chain,
    Field,
    Node,
    Operand,
    Pipe,
    Program,
    Range,
    Variable,
)
from puna.chat.gotemplate.parser import parse
from puna.chat.gotemplate.run import bounds, execute
from puna.chat.gotemplate.values import Json, Names, Struct
from puna.chat.messages import Message, parse_messages
from puna.chat.template import MAX_SOURCE, ChatTemplate, Template, as_plain, cut_at_end_mark, with_end_marked
from puna.errors import TemplateError
from puna.tokenizer import Tokenizer

_ROLES = {"developer": "system", "ipython": "tool"}
_RESPONSE = Action(Pipe(0, ((Field(("Response",)),),)))
_GO_ACTION = re.compile(
    r"\{\{(?:-\s)?\s*(?:/\*|[.$]|(?:if|with|range|template|define|block|(?:print|json|and|or|not|eq|ne|len|index)\w*)"
    r"\s+[.$\"`(\w])"
)


def is_go_template(source: str) -> bool:
    """Whether a chat template is written in Go's language; else it is Jinja.

    A Jinja template that does more than print has ``{%``; what it prints never begins like Go's fields, variables,
    comments and calls.
    """
    return "{%" not in source and _GO_ACTION.search(source) is not None


def chat_template(source: str, tokenizer: Tokenizer) -> Template:
    """A template for a tokenizer, of the language that it is written in. Raises TemplateError."""
    return GoTemplate(source) if is_go_template(source) else ChatTemplate.for_tokenizer(source, tokenizer)


class GoTemplate:
    """A chat template in Go's language, parsed once. Raises TemplateError, naming the line, when it does not compile.

    One that uses ``.Messages`` is rendered once. An older one, of ``.System``, ``.Prompt`` and ``.Response``, is
    rendered for every exchange, and the last time only up to ``.Response``, where the model goes on.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE}")
        program = parse(source.replace("\r\n", "\n"), (*FUNCTIONS, *SHORT_CIRCUIT))
        self.names = frozenset(_names(program))
        if not self.names & {"messages", "response"}:
            program = replace(program, body=(*program.body, _RESPONSE))
        self._program = program
        self._to_response = replace(program, body=_Cut().body(program.body))

    @property
    def takes_messages(self) -> bool:
        """Whether the template loops over the conversation itself."""
        return bool(self.names & {"messages", "document"})

    @property
    def takes_suffix(self) -> bool:
        """Whether the template can ask for what stands between a prompt and a suffix."""
        return "suffix" in self.names

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt's text.

        ``enable_thinking`` (a boolean, or None for not said) is ``.Think`` and ``.IsThinkSet``, ``reasoning_effort``
        is ``.ThinkLevel``. With ``suffix`` the one message is the text before it. Other ``variables``, and documents,
        have no name in these templates. Raises RequestError for malformed messages, TemplateError.
        """
        plain = [message.to_dict() for message in parse_messages(messages)]
        if continue_final_message:
            if add_generation_prompt:
                raise TemplateError("continue_final_message and add_generation_prompt exclude each other")
            plain[-1] = with_end_marked(plain[-1])
        elif not add_generation_prompt:
            raise TemplateError("a template in Go's language writes the beginning of the answer itself; ask for it")
        thinks = variables.get("enable_thinking")
        common = {
            "Response": "",
            "Think": bool(thinks),
            "IsThinkSet": thinks is not None,
            "ThinkLevel": str(variables.get("reasoning_effort") or ""),
        }
        suffix = variables.get("suffix")
        try:
            given = as_plain([plain, tools])
            conversation = _collated(given[0])
            with bounds([given, suffix]):
                if suffix:
                    prompt = "".join(_text(message) for message in given[0])
                    text = execute(self._program, {**common, "Prompt": prompt, "Suffix": str(suffix)})
                elif self.takes_messages:
                    text = execute(self._program, {**common, **_values(conversation, given[1])})
                else:
                    text = "".join(self._turns(conversation, common))
        except RecursionError:
            raise TemplateError("the conversation is nested too deep for a chat template") from None
        return cut_at_end_mark(text) if continue_final_message else text

    def _turns(self, messages: list[dict[str, Any]], common: Mapping[str, Any]) -> Iterator[str]:
        """One rendering for each exchange: system text, prompt and response, whichever of them there are."""
        turn: dict[str, str] = {}
        first = True
        for message in messages:
            place = {"system": "System", "user": "Prompt", "assistant": "Response"}.get(message["role"])
            if place is None:
                raise TemplateError(
                    f"this chat template has no place for a message of the role {message['role']!r}; "
                    "use one that loops over .Messages"
                )
            earlier = {"System": ("Prompt", "Response"), "Prompt": ("Response",), "Response": ()}[place]
            if any(turn.get(name) for name in earlier):
                yield execute(self._program, _turn(common, turn, first))
                turn, first = {}, False
            turn[place] = message["content"]
        yield execute(self._to_response, _turn(common, turn, first))


def _turn(common: Mapping[str, Any], turn: Mapping[str, str], first: bool) -> dict[str, Any]:
    return {**common, "System": "", "Prompt": "", **turn, "First": first}


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _collated(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of one role that follow each other become one, their texts parted by an empty line; tools' don't."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        role = _ROLES.get(message["role"], message["role"])
        calls = list(message.get("tool_calls") or ())
        if merged and merged[-1]["role"] == role != "tool":
            last = merged[-1]
            last["content"] += "\n\n" + _text(message)
            last["tool_calls"] = last["tool_calls"] + calls
        else:
            merged.append({**message, "role": role, "content": _text(message), "tool_calls": calls})
    return merged


def _values(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    given = list(tools or ())
    return {
        "System": "\n\n".join(message["content"] for message in messages if message["role"] == "system"),
        "Messages": [_message(message) for message in messages],
        "Tools": Json([_tool(tool) for tool in given], [_tool(tool) for tool in given]),
        "Query": "",
        "Document": "",
        "Instruction": "",
    }


def _message(message: Mapping[str, Any]) -> Struct:
    fields = {
        "Role": message["role"],
        "Content": message["content"],
        "Thinking": message.get("reasoning_content") or "",
        "Images": [],
        "ToolCalls": [_call(call) for call in message["tool_calls"]],
        "ToolName": message.get("name") or "",
        "ToolCallID": message.get("tool_call_id") or "",
    }
    keys = ("role", "content", "thinking", "images", "tool_calls", "tool_name", "tool_call_id")
    raw = {key: value for key, value in zip(keys, fields.values(), strict=True) if value or key in ("role", "content")}
    return Struct("message", fields, raw)


def _call(call: Mapping[str, Any]) -> Struct:
    function = call["function"]
    arguments = function.get("arguments", {})
    shown = {"name": function["name"], "arguments": arguments}
    fields = {
        "Index": call.get("index", 0),
        "Name": function["name"],
        "Arguments": Json(arguments, arguments) if isinstance(arguments, Mapping) else arguments,
    }
    raw = {**({"id": call["id"]} if call.get("id") else {}), "function": shown}
    return Struct("tool call", {"ID": call.get("id") or "", "Function": Struct("function call", fields, shown)}, raw)


def _ordered(raw: Mapping[str, Any], first: Sequence[str]) -> dict[str, Any]:
    """The keys that ollama knows in its order, then any others."""
    return {key: raw[key] for key in (*(key for key in first if key in raw), *(k for k in raw if k not in first))}


def _tool(tool: Any) -> Struct:
    tool = _object(tool)
    function = _object(tool.get("function"))
    parameters = _object(function.get("parameters"))
    properties = {name: _property(_object(raw)) for name, raw in _object(parameters.get("properties")).items()}
    shape = dict(parameters)
    if "properties" in parameters:
        shape["properties"] = properties
    schema = Struct(
        "parameters",
        {
            "Type": parameters.get("type", ""),
            "Defs": parameters.get("$defs"),
            "Items": parameters.get("items"),
            "Required": parameters.get("required") or [],
            "Properties": Json(properties, properties),
        },
        _ordered(shape, ("type", "$defs", "items", "required", "properties")),
    )
    shown = dict(function)
    if "parameters" in function:
        shown["parameters"] = schema
    described = Struct(
        "function",
        {"Name": function.get("name", ""), "Description": function.get("description", ""), "Parameters": schema},
        _ordered(shown, ("name", "description", "parameters")),
    )
    fields = {"Type": tool.get("type", ""), "Items": tool.get("items"), "Function": described}
    return Struct("tool", fields, _ordered({**tool, "function": described}, ("type", "items", "function")))


def _property(raw: Mapping[str, Any]) -> Struct:
    kind = raw.get("type", [])
    kinds = Names(map(str, kind if isinstance(kind, list) else [kind]))
    choices = raw.get("anyOf")
    fields = {
        "AnyOf": [_property(_object(item)) for item in choices] if isinstance(choices, list) else [],
        "Type": kinds,
        "Items": raw.get("items"),
        "Description": raw.get("description", ""),
        "Enum": raw.get("enum") or [],
        "Properties": {name: _property(_object(item)) for name, item in _object(raw.get("properties")).items()},
    }
    return Struct("property", fields, _ordered(raw, ("anyOf", "type", "items", "description", "enum", "properties")))


def _object(raw: Any) -> Mapping[str, Any]:
    return raw if isinstance(raw, Mapping) else {}


def _names(program: Program) -> Iterator[str]:
    """Every field name a template uses, in lower case."""
    waiting: list[Node | Operand | None] = [node for body in (program.body, *program.defined.values()) for node in body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (Field, Variable, Chain)):
            yield from (name.lower() for name in node.names)
        if isinstance(node, Pipe):
            waiting += [operand for command in node.commands for operand in command]
        elif isinstance(node, Branch):
            waiting += [part for pipe, body in node.arms for part in (pipe, *body)]
            waiting += node.otherwise
        elif isinstance(node, Range):
            waiting += [node.pipe, *node.body, *node.otherwise]
        elif isinstance(node, (Action, Call, Chain)):
            waiting.append(node.pipe)


class _Cut:
    """A template without what stands behind its first ``.Response``: the model writes on from there."""

    def __init__(self) -> None:
        self.done = False

    def body(self, nodes: Body) -> Body:
        kept = []
        for node in nodes:
            if self.done:
                break
            kept.append(self.node(node))
        return tuple(kept)

    def node(self, node: Node) -> Node:
        if isinstance(node, Action):
            self.done = any("Response" in names for names in _fields(node.pipe))
            return node
        if isinstance(node, Branch):
            arms = tuple((pipe, self.body(body)) for pipe, body in node.arms)
            return Branch(node.kind, arms, self.body(node.otherwise))
        if isinstance(node, Range):
            return Range(node.pipe, self.body(node.body), self.body(node.otherwise))
        return node


def _fields(pipe: Pipe) -> Iterator[tuple[str, ...]]:
    for command in pipe.commands:
        for operand in command:
            if isinstance(operand, (Field, Variable)):
                yield operand.names
            elif isinstance(operand, Pipe):
                yield from _fields(operand)
