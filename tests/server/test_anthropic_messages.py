"""Anthropic's API, by its own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import anthropic
import httpx
import pytest
from running_server import RunningServer

from puna.errors import RequestError
from puna.server.pieces import Delta

QUESTION = [{"role": "user", "content": "What is 2+2?"}]
ANSWER = "The answer to this classic math problem is 4."
# The newest client has no parameter for it any more.
GREEDY = {"temperature": 0}
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture
def client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


def test_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="smollm2", max_tokens=30, extra_body=GREEDY, messages=QUESTION)
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == ANSWER
    assert (message.role, message.model) == ("assistant", "smollm2")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens > 0


def test_streaming_gives_the_same_message(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model="smollm2", max_tokens=30, extra_body=GREEDY, messages=QUESTION)
    with client.messages.stream(model="smollm2", max_tokens=30, extra_body=GREEDY, messages=QUESTION) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == ANSWER
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_the_async_client(server: RunningServer) -> None:
    async def run() -> str:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as client:
            asked = [
                client.messages.create(model="smollm2", max_tokens=30, extra_body=GREEDY, messages=QUESTION)
                for _ in range(3)
            ]
            texts = {message.content[0].text for message in await asyncio.gather(*asked)}
            async with client.messages.stream(
                model="smollm2", max_tokens=30, extra_body=GREEDY, messages=QUESTION
            ) as stream:
                texts.add("".join([text async for text in stream.text_stream]))
        assert len(texts) == 1
        return texts.pop()

    assert asyncio.run(run()) == ANSWER


def test_the_order_and_form_of_events(http: httpx.Client) -> None:
    body = {"model": "smollm2", "max_tokens": 30, "temperature": 0, "stream": True, "messages": QUESTION}
    lines = http.post("/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"}).text.split("\n\n")
    events = []
    for block in filter(None, lines):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert "".join(e["delta"]["text"] for e in events if e["type"] == "content_block_delta") == ANSWER
    assert events[0]["message"]["content"] == []
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


def test_why_it_stops(client: anthropic.Anthropic) -> None:
    stopped = client.messages.create(
        model="smollm2", max_tokens=30, extra_body=GREEDY, messages=QUESTION, stop_sequences=["never", "4"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "4")
    assert stopped.content[0].text == ANSWER.split("4")[0]
    cut = client.messages.create(model="smollm2", max_tokens=3, extra_body=GREEDY, messages=QUESTION)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)


def test_cached_tokens_are_counted_apart(client: anthropic.Anthropic) -> None:
    messages = [{"role": "user", "content": "Tell me about the sea. " * 20}]
    create = {"model": "smollm2", "max_tokens": 1, "messages": messages, "cache_control": {"type": "ephemeral"}}
    first, second = client.messages.create(**create).usage, client.messages.create(**create).usage
    total = client.messages.count_tokens(model="smollm2", messages=messages).input_tokens
    for usage in (first, second):
        assert usage.input_tokens + usage.cache_read_input_tokens == total
    assert second.cache_read_input_tokens > 64


def test_a_last_message_of_the_assistant_is_continued(client: anthropic.Anthropic) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "The answer to this classic math problem"}]
    message = client.messages.create(model="smollm2", max_tokens=30, extra_body=GREEDY, messages=messages)
    assert message.content[0].text == " is 4."


def test_thinking_and_tool_calls(client: anthropic.Anthropic, structured: None) -> None:
    ask = {"model": "smollm2", "max_tokens": 100, "messages": QUESTION, "tools": [WEATHER], "extra_body": GREEDY}
    whole = client.messages.create(**ask)
    with client.messages.stream(**ask) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "tool_use"
        thinking, text, first, second = message.content
        assert (thinking.type, thinking.thinking) == ("thinking", "Let me look.")
        assert (text.type, text.text) == ("text", "One moment.")
        assert (first.type, first.id, first.name, first.input) == (
            "tool_use",
            "call_a",
            "get_weather",
            {"city": "Paris"},
        )
        assert (second.id, second.name, second.input) == ("call_b", "get_time", {})


def test_a_required_call_fits_its_schema(client: anthropic.Anthropic) -> None:
    ask = {"model": "smollm2", "max_tokens": 200, "messages": QUESTION, "tools": [WEATHER], "extra_body": GREEDY}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "get_weather"}):
        whole = client.messages.create(**ask, tool_choice=choice)
        with client.messages.stream(**ask, tool_choice=choice) as stream:
            streamed = stream.get_final_message()
        for message in (whole, streamed):
            assert message.stop_reason == "tool_use"
            call = message.content[-1]
            assert (call.type, call.name) == ("tool_use", "get_weather")
            assert isinstance(call.input["city"], str)
        assert whole.content[-1].input == streamed.content[-1].input
    chat = client.messages.create(**ask, tool_choice={"type": "none"})
    assert {block.type for block in chat.content} == {"text"}


def test_a_conversation_with_results_of_tools(client: anthropic.Anthropic, structured: None) -> None:
    """What the client got, echoed back as it is, is a good conversation."""
    answer = client.messages.create(model="smollm2", max_tokens=30, messages=QUESTION, tools=[WEATHER])
    results = [
        {"type": "tool_result", "tool_use_id": "call_a", "content": [{"type": "text", "text": "12 degrees"}]},
        {"type": "tool_result", "tool_use_id": "call_b", "content": "no clock", "is_error": True},
        {"type": "text", "text": "So?"},
    ]
    history = [*QUESTION, {"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
    with_results = client.messages.count_tokens(model="smollm2", messages=history, tools=[WEATHER]).input_tokens
    assert with_results > client.messages.count_tokens(model="smollm2", messages=QUESTION).input_tokens
    client.messages.create(model="smollm2", max_tokens=2, messages=history, tools=[WEATHER])


def test_output_format_is_enforced(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [4, 5]}}, "required": ["n"], "additionalProperties": False}
    message = client.messages.create(
        model="smollm2",
        max_tokens=60,
        extra_body=GREEDY,  # chance may spend all tokens on the white space that JSON allows
        messages=QUESTION,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert json.loads(message.content[0].text)["n"] in (4, 5)


def test_the_count_is_that_of_the_message(client: anthropic.Anthropic) -> None:
    ask = {
        "model": "smollm2",
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [*QUESTION, {"role": "assistant", "content": "4"}, {"role": "user", "content": "And <|im_end|>?"}],
    }
    counted = client.messages.count_tokens(**ask).input_tokens
    usage = client.messages.create(**ask, max_tokens=1).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
BASE = {"model": "smollm2", "max_tokens": 5, "messages": QUESTION}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"colour": "red"}, "colour is not known"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "image, which is not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "no tool_use"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "messages.0.content.0"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": [CALL]}]}, "messages.1 calls tools"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "a user's message can't hold"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "only custom tools"),
        ({"tools": [{"name": "x"}]}, "input_schema"),
        ({"tool_choice": {"type": "any"}}, "no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "none of the tools"),
        ({"stop_sequences": [""]}, "stop"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}}, "JSON schema"),
    ],
)
def test_what_is_refused(http: httpx.Client, change: dict[str, object], words: str) -> None:
    body = {name: value for name, value in {**BASE, **change}.items() if value is not None}
    reply = http.post("/v1/messages", json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["type"] == "error"
    assert reply.json()["error"]["type"] == "invalid_request_error"
    assert words in reply.json()["error"]["message"]


def test_errors_are_the_clients_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="no model nothing"):
        client.messages.create(model="nothing", max_tokens=5, messages=QUESTION)
    with pytest.raises(anthropic.BadRequestError, match="context of"):
        client.messages.create(
            model="smollm2", max_tokens=5, messages=[{"role": "user", "content": "word " * 10000}], stream=True
        )


def test_a_failure_in_mid_stream_is_an_error_event(
    client: anthropic.Anthropic, structured: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, text: str) -> list[Delta]:
        raise RequestError("the model failed")

    monkeypatch.setattr(structured, "push", fail)
    stream = client.messages.create(model="smollm2", max_tokens=5, messages=QUESTION, stream=True)
    with pytest.raises(anthropic.APIError, match="the model failed"):
        list(stream)


def test_a_client_that_leaves_cancels(server: RunningServer, http: httpx.Client) -> None:
    body = {"model": "smollm2", "max_tokens": 4000, "messages": QUESTION, "temperature": 1, "stream": True}
    with http.stream("POST", "/v1/messages", json=body) as reply:
        next(reply.iter_lines())
    # The server notices when it next writes or hears of the closed connection; readyz answers between two steps.
    while server.service.engine_thread.num_running:
        http.get("/readyz")
