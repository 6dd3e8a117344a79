"""Tools through the real server and clients. SmolLM2 is small: what it calls is left to it, that it calls is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from running_server import RunningServer

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]
QUESTION: Any = [{"role": "user", "content": "How is the weather in Oslo?"}]
COMMON: Any = {"model": "smollm2", "messages": QUESTION, "tools": TOOLS, "temperature": 0, "max_completion_tokens": 200}
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def fits(arguments: str) -> bool:
    found = json.loads(arguments)
    return found.keys() == {"city", "days"} and found["city"] in ("Oslo", "Rome") and found["days"] in range(1, 6)


def test_a_named_tool_is_called_with_arguments_that_fit(client: openai.OpenAI) -> None:
    for stream in (False, True):
        if stream:
            with client.chat.completions.stream(**COMMON, tool_choice=NAMED, parallel_tool_calls=False) as events:
                list(events)
                choice: Any = events.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(**COMMON, tool_choice=NAMED, parallel_tool_calls=False).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert not choice.message.content
        (call,) = choice.message.tool_calls
        assert call.function.name == "get_weather"
        assert fits(call.function.arguments)
        assert call.id


def test_required_calls_one_of_them(client: openai.OpenAI) -> None:
    for seed in range(3):
        options = {**COMMON, "temperature": 1.0, "seed": seed}
        found = client.chat.completions.create(**options, tool_choice="required", parallel_tool_calls=False)
        (call,) = found.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name in ("get_weather", "get_time")
        assert call.function.name == "get_time" or fits(call.function.arguments)


def test_only_the_allowed_tools_are_shown_and_called(client: openai.OpenAI) -> None:
    allowed: Any = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]},
    }
    found = client.chat.completions.create(**COMMON, tool_choice=allowed, parallel_tool_calls=False)
    (call,) = found.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "get_time"


def test_none_answers_in_text(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(**COMMON, tool_choice="none").choices[0].message
    assert found.tool_calls is None
    assert found.content


def test_the_result_of_a_call_goes_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**COMMON, tool_choice=NAMED, parallel_tool_calls=False).choices[0].message
    assert first.tool_calls
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "Sunny, 20 degrees"}
    messages: Any = [*QUESTION, first.model_dump(), result]
    second = client.chat.completions.create(**{**COMMON, "messages": messages}, tool_choice="none")
    assert second.choices[0].message.content


def test_a_schema_that_cannot_be_enforced_is_refused(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "what"}}}]
    with pytest.raises(openai.BadRequestError, match="what"):
        client.chat.completions.create(**{**COMMON, "tools": tools}, tool_choice="required")
