"""/v1/responses by OpenAI's client, checked against the API's own description."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai_schemas import check
from running_server import RunningServer

from puna.errors import NotFoundError, RequestError
from puna.server.openai.response_input import messages_of
from puna.server.openai.response_store import KEPT, ResponseStore
from puna.server.pieces import Delta
from puna.server.records import new_id

QUESTION = "What is 2+2?"
ANSWER = "The answer to this classic math problem is 4."
BASE: dict[str, Any] = {"model": "smollm2", "temperature": 0, "max_output_tokens": 40}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_response(client: openai.OpenAI, shared_data: Path) -> None:
    response = client.responses.create(**BASE, input=QUESTION, metadata={"for": "test"})
    check(shared_data, "Response", response.to_dict())
    assert response.output_text == ANSWER
    assert (response.status, response.metadata, response.temperature) == ("completed", {"for": "test"}, 0)
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert client.responses.retrieve(response.id) == response


def test_streams_tell_the_same(client: openai.OpenAI, shared_data: Path) -> None:
    events = list(client.responses.create(**BASE, input=QUESTION, stream=True))
    for event in events:
        check(shared_data, "ResponseStreamEvent", event.to_dict())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    final = events[-1]
    assert final.type == "response.completed"
    assert final.response.output_text == ANSWER
    assert client.responses.retrieve(final.response.id) == final.response


def test_the_clients_own_stream_and_the_async_client(server: RunningServer) -> None:
    async def run() -> set[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            texts = {(await client.responses.create(**BASE, input=QUESTION)).output_text}
            async with client.responses.stream(**BASE, input=QUESTION) as stream:
                async for _ in stream:
                    pass
                texts.add((await stream.get_final_response()).output_text)
            return texts

    assert asyncio.run(run()) == {ANSWER}


def test_a_conversation_goes_on(client: openai.OpenAI, shared_data: Path) -> None:
    first = client.responses.create(**BASE, input=QUESTION, instructions="Be brief.")
    second = client.responses.create(**BASE, input="And 3+3?", previous_response_id=first.id)
    third = client.responses.create(
        **BASE,
        input=[
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": [{"type": "input_text", "text": "And 3+3?"}]},
        ],
    )
    assert second.previous_response_id == first.id
    assert second.output_text == third.output_text
    assert second.usage is not None
    assert third.usage is not None
    assert second.usage.input_tokens == third.usage.input_tokens
    items = client.responses.input_items.list(second.id, order="asc", limit=2)
    check(shared_data, "ResponseItemList", items.to_dict())
    texts = [item.content[0].text for item in items if item.type == "message"]  # type: ignore[union-attr]
    assert texts == [QUESTION, first.output_text, "And 3+3?"]
    newest = client.responses.input_items.list(second.id).data[0]
    assert newest.content[0].text == "And 3+3?"  # type: ignore[union-attr]


def test_the_count_is_that_of_the_response(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "smollm2", "input": QUESTION, "tools": [WEATHER], "instructions": "Be brief."}
    counted = client.responses.input_tokens.count(**ask).input_tokens
    usage = client.responses.create(**ask, max_output_tokens=1).usage
    assert usage is not None
    assert counted == usage.input_tokens


def test_deleting_and_not_storing(client: openai.OpenAI) -> None:
    kept = client.responses.create(**BASE, input=QUESTION)
    later = client.responses.create(**BASE, input=QUESTION, previous_response_id=kept.id)
    client.responses.delete(kept.id)
    unkept = client.responses.create(**BASE, input=QUESTION, store=False)
    for gone in (kept.id, unkept.id):
        with pytest.raises(openai.NotFoundError, match="no response"):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError, match="no response"):
            client.responses.create(**BASE, input=QUESTION, previous_response_id=gone)
    with pytest.raises(openai.NotFoundError, match="the conversation of"):
        client.responses.create(**BASE, input=QUESTION, previous_response_id=later.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(kept.id)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(later.id)


def test_an_answer_that_is_cut_off_is_incomplete(client: openai.OpenAI, shared_data: Path) -> None:
    response = client.responses.create(model="smollm2", temperature=0, max_output_tokens=3, input=QUESTION)
    check(shared_data, "Response", response.to_dict())
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"  # type: ignore[union-attr]
    events = list(
        client.responses.create(model="smollm2", temperature=0, max_output_tokens=3, input=QUESTION, stream=True)
    )
    assert events[-1].type == "response.incomplete"


def test_structured_output(client: openai.OpenAI) -> None:
    class Sum(pydantic.BaseModel):
        result: int

    parsed = client.responses.parse(model="smollm2", temperature=0, input=QUESTION, text_format=Sum)
    assert isinstance(parsed.output_parsed, Sum)
    text = client.responses.create(**BASE, input=QUESTION, text={"format": {"type": "json_object"}}).output_text
    assert text.startswith("{")


def test_logprobs(client: openai.OpenAI, shared_data: Path) -> None:
    response = client.responses.create(**BASE, input=QUESTION, include=["message.output_text.logprobs"], top_logprobs=2)
    check(shared_data, "Response", response.to_dict())
    logprobs = response.output[0].content[0].logprobs  # type: ignore[union-attr]
    assert "".join(entry.token for entry in logprobs or []).startswith(ANSWER)
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in logprobs or [])


def test_thinking_and_tool_calls(client: openai.OpenAI, structured: None, shared_data: Path) -> None:
    ask: dict[str, Any] = {**BASE, "input": QUESTION, "tools": [WEATHER]}
    whole = client.responses.create(**ask)
    check(shared_data, "Response", whole.to_dict())
    events = list(client.responses.create(**ask, stream=True))
    for event in events:
        check(shared_data, "ResponseStreamEvent", event.to_dict())
    assert events[-1].type == "response.completed"
    for response in (whole, events[-1].response):
        thinking, text, first, second = response.output
        assert thinking.type == "reasoning"
        assert [part.text for part in thinking.content or []] == ["Let me look."]
        assert text.type == "message"
        assert response.output_text == "One moment."
        assert first.type == second.type == "function_call"
        assert (first.call_id, first.name, json.loads(first.arguments)) == ("call_a", "get_weather", {"city": "Paris"})
        assert (second.call_id, second.name, second.arguments) == ("call_b", "get_time", "{}")
    results: list[Any] = [
        {"type": "function_call_output", "call_id": "call_a", "output": "12 degrees"},
        {"type": "function_call_output", "call_id": "call_b", "output": [{"type": "input_text", "text": "noon"}]},
    ]
    echoed = [{"role": "user", "content": QUESTION}, *[item.to_dict() for item in whole.output], *results]
    by_hand = client.responses.create(**BASE, input=echoed, tools=[WEATHER])
    stored = client.responses.create(**BASE, input=results, tools=[WEATHER], previous_response_id=whole.id)
    assert by_hand.usage is not None
    assert stored.usage is not None
    assert by_hand.usage.input_tokens == stored.usage.input_tokens
    items = client.responses.input_items.list(stored.id)
    check(shared_data, "ResponseItemList", items.to_dict())


def test_a_required_call_fits_its_schema(client: openai.OpenAI, shared_data: Path) -> None:
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        ask: dict[str, Any] = {"model": "smollm2", "input": QUESTION, "tools": [WEATHER], "tool_choice": choice}
        response = client.responses.create(**ask, temperature=0, max_output_tokens=200, parallel_tool_calls=False)
        check(shared_data, "Response", response.to_dict())
        (call,) = response.output
        assert call.type == "function_call"
        assert isinstance(json.loads(call.arguments)["city"], str)


def test_what_is_said_in_a_row_is_one_message() -> None:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call", "call_id": "2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "2", "output": "c"},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "d"}]},
    ]
    user, assistant, result, last = messages_of(items)
    assert (user.role, user.content) == ("user", "a")
    assert (assistant.role, assistant.content, assistant.reasoning_content) == ("assistant", "b", "hm")
    assert [call["function"]["name"] for call in assistant.tool_calls] == ["f", "g"]
    assert (result.role, result.content, result.tool_call_id, result.name) == ("tool", "c", "2", "g")
    assert (last.role, last.content) == ("assistant", "d")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": None}, "input is empty"),
        ({"input": []}, "input is empty"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "send the item itself"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "web_search_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "text only"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": "y"}]}, "no function_call before"),
        ({"tools": [{"type": "web_search"}]}, "no web_search tool"),
        ({"tools": [WEATHER, WEATHER]}, "names must differ"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tool_choice": {"type": "function", "name": "x"}}, "not among the tools"),
        ({"tool_choice": {"type": "file_search"}}, "no file_search tool"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "previous_response_id"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"text": {"verbosity": "high"}}, "verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "nothing"}}}}, "JSON schema"),
        ({"top_logprobs": 2}, "include"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"metadata": {f"{i}": "x" for i in range(17)}}, "metadata"),
        ({"colour": "red"}, "colour"),
        ({"input": "word " * 10000}, "context of"),
    ],
)
def test_what_is_refused(http: httpx.Client, change: dict[str, Any], words: str) -> None:
    for stream in (False, True):
        reply = http.post("/v1/responses", json={**BASE, "input": QUESTION, "stream": stream, **change})
        assert reply.status_code == 400, reply.text
        assert words in reply.json()["error"]["message"]


def test_truncation_drops_the_oldest(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "word " * 10000}, {"role": "user", "content": QUESTION}]
    assert client.responses.create(**BASE, input=long, truncation="auto").output_text == ANSWER
    with pytest.raises(openai.BadRequestError, match="context of"):
        client.responses.create(**BASE, input=long, truncation="disabled")


def test_a_failure_in_mid_stream_is_an_event(
    client: openai.OpenAI, structured: type, monkeypatch: pytest.MonkeyPatch, shared_data: Path
) -> None:
    def fail(self: object, text: str) -> list[Delta]:
        raise RequestError("the model failed")

    monkeypatch.setattr(structured, "push", fail)
    events = list(client.responses.create(**BASE, input=QUESTION, stream=True))
    check(shared_data, "ResponseStreamEvent", events[-1].to_dict())
    assert events[-1].type == "response.failed"
    assert events[-1].response.error is not None
    assert "the model failed" in events[-1].response.error.message
    with pytest.raises(openai.BadRequestError, match="the model failed"):
        client.responses.create(**BASE, input=QUESTION)


def test_a_response_is_its_tenants_own_and_kept_for_a_month(tmp_path: Path) -> None:
    store = ResponseStore(tmp_path)
    response = {"id": new_id("resp_"), "previous_response_id": None, "output": []}
    store.keep("ann", response, [])
    assert store.response("ann", response["id"]) == response
    for call in (store.response, store.history, store.input_items, store.records.delete):
        with pytest.raises(NotFoundError):
            call("bob", response["id"])
    (path,) = store.records.folder.iterdir()
    store.clean()
    assert path.exists()
    then = path.stat().st_mtime - KEPT - 10
    os.utime(path, (then, then))
    store.clean()
    assert not path.exists()


def test_a_client_that_leaves_cancels(server: RunningServer, http: httpx.Client) -> None:
    body = {"model": "smollm2", "input": QUESTION, "stream": True, "text": {"format": {"type": "json_object"}}}
    with http.stream("POST", "/v1/responses", json=body) as reply:
        next(reply.iter_lines())
    while server.service.engine_thread.num_running:
        http.get("/readyz")
