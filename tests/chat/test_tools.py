"""Tools checked, formats chosen, and conversations that every template shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from puna.chat.builtin import BUILTIN
from puna.chat.messages import parse_messages
from puna.chat.template import ChatTemplate
from puna.chat.tools import (
    Tool,
    ToolChoice,
    check_tool_choice,
    check_tools,
    from_anthropic,
    from_ollama,
    tool_conversation,
    tool_format,
)
from puna.errors import RequestError

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}, "required": ["city"]}
FUNCTION = {"name": "get_weather", "description": "the weather", "parameters": SCHEMA}


class Vocabulary:
    def __init__(self, *special: str) -> None:
        self.special_tokens = {token: 1000 + i for i, token in enumerate(special)}


LLAMA3 = Vocabulary("<|eot_id|>", "<|python_tag|>")
PLAIN = Vocabulary()


def source(shared_data: Path, name: str) -> str:
    if name in BUILTIN:
        return BUILTIN[name]
    return (shared_data / "templates" / "jinja" / name).read_text(encoding="utf-8")


def test_shapes_of_three_apis() -> None:
    tool = Tool("get_weather", "the weather", SCHEMA)
    assert check_tools([{"type": "function", "function": FUNCTION}]) == [tool]
    anthropic = {"name": "get_weather", "description": "the weather", "input_schema": SCHEMA}
    assert check_tools(
        [
            from_anthropic(anthropic),
        ]
    ) == [tool]
    assert check_tools([from_ollama({"function": FUNCTION})]) == [tool]
    assert check_tools(None) == []
    assert check_tools([{"type": "function", "function": {"name": "f", "parameters": None}}]) == [Tool("f")]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("f", r"tools must be a list"),
        ([1], r"tools\[0\] must be an object"),
        ([{"type": "web_search"}], r"tools\[0\].type must be 'function'"),
        ([{"type": "function"}], r"tools\[0\].function must be"),
        ([{"type": "function", "function": {"name": "a b"}}], r"tools\[0\].function.name"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], r"function.parameters must be a JSON"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}], r"parameters.type"),
        ([{"type": "function", "function": {"name": "f", "strict": 1}}], r"function.strict"),
        ([{"type": "function", "function": {"name": "f"}}] * 2, r"tools\[1\].function.name 'f' is there twice"),
        ([{"type": "function", "function": {"name": "f"}}] * 129, r"more than 128"),
    ],
)
def test_bad_tools_are_refused_by_field(raw, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_tools(raw)


def test_tool_choice() -> None:
    tools = [Tool("f")]
    assert check_tool_choice(None, tools) == ToolChoice("auto")
    assert check_tool_choice(None, []) == ToolChoice("none")
    assert check_tool_choice("required", tools) == ToolChoice("required")
    assert check_tool_choice({"type": "function", "function": {"name": "f"}}, tools) == ToolChoice("required", "f")
    for raw, given in (("auto", []), ("any", tools), ({"type": "function", "function": {"name": "g"}}, tools)):
        with pytest.raises(RequestError, match="tool_choice"):
            check_tool_choice(raw, given)


@pytest.mark.parametrize(
    ("name", "vocabulary", "style", "shown"),
    [
        ("meta-llama-Llama-3.1-8B-Instruct.jinja", LLAMA3, "llama_json", (True, True, False, True)),
        ("meta-llama-Llama-3.2-3B-Instruct.jinja", LLAMA3, "llama_json", (True, True, False, False)),
        ("meta-llama-Llama-3.3-70B-Instruct.jinja", LLAMA3, "llama_json", (True, True, False, True)),
        ("llama4.jinja", Vocabulary("<|python_start|>"), "llama_json", (True, True, True, False)),
        ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use.jinja", LLAMA3, "tags", (True, True, True, False)),
        ("SmolLM2-135M-Instruct.jinja", PLAIN, "tags", (False, False, False, False)),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja", PLAIN, "tags", (False, False, False, False)),
        ("llama3.jinja", LLAMA3, "llama_json", (False, False, False, False)),
        ("llama2", PLAIN, "tags", (False, False, False, False)),
        ("llama3", Vocabulary("<|python_start|>"), "pythonic", (False, False, False, False)),
    ],
)
def test_format_and_conversation(name, vocabulary, style, shown, shared_data) -> None:
    text = source(shared_data, name)
    form = tool_format(ChatTemplate(text), vocabulary)
    flags = (form.template_shows_tools, form.template_shows_calls, form.template_shows_parallel_calls)
    assert (form.style, (*flags, form.template_builtins)) == (style, shown)
    assert set(form.visible_special_tokens) == (
        {"<|python_tag|>"} & set(vocabulary.special_tokens) - {"<|python_tag|>" if style == "tags" else ""}
    )

    calls = [
        {"id": i, "type": "function", "function": {"name": "get_weather", "arguments": f'{{"city": "{city}"}}'}}
        for i, city in (("a", "Oslo"), ("b", "Rome"))
    ]
    messages = parse_messages(
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "b", "content": "sunny"},
            {"role": "tool", "tool_call_id": "a", "content": "snow"},
            {"role": "user", "content": "Thanks"},
        ]
    )
    conversation = tool_conversation(form, messages, [Tool("get_weather", "tells the weather", SCHEMA)])
    rendered = ChatTemplate(text, "<s>", "</s>").render(
        conversation.messages, tools=conversation.tools, **conversation.variables
    )
    for part in ("tells the weather", "Oslo", "Rome", "sunny", "snow", "Thanks"):
        assert rendered.count(part) == 1, (part, rendered)
    if name.startswith("meta-llama"):
        assert rendered.index("Oslo") < rendered.index("snow") < rendered.index("Rome") < rendered.index("sunny")


def test_builtin_tools_are_switched_on(shared_data) -> None:
    text = source(shared_data, "meta-llama-Llama-3.1-8B-Instruct.jinja")
    form = tool_format(ChatTemplate(text), LLAMA3)
    call = {"type": "function", "function": {"name": "brave_search", "arguments": {"query": "gold", "count": 3}}}
    messages = parse_messages([{"role": "user", "content": "Gold?"}, {"role": "assistant", "tool_calls": [call]}])
    conversation = tool_conversation(form, messages, [Tool("brave_search"), Tool("code_interpreter"), Tool("f")])
    assert [tool["function"]["name"] for tool in conversation.tools or []] == ["f"]
    rendered = ChatTemplate(text).render(conversation.messages, tools=conversation.tools, **conversation.variables)
    assert "Environment: ipython\nTools: brave_search\n" in rendered
    assert '<|python_tag|>brave_search.call(query="gold", count="3")<|eom_id|>' in rendered


def test_tools_go_into_the_system_message_that_is_there(shared_data) -> None:
    form = tool_format(ChatTemplate(BUILTIN["chatml"]), PLAIN)
    messages = parse_messages([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
    [system, user] = tool_conversation(form, messages, [Tool("f", "does {things}")]).messages
    assert system.text.startswith("Be brief.\n\nYou can call functions")
    assert '"does {things}"' in system.text
    assert user == messages[1]
