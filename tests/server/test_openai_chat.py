"""/v1/chat/completions: against OpenAI's schema, and the library's own answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai_schemas import check
from running_server import RunningServer

from puna.llm import LLM

QUESTION = [{"role": "user", "content": "What is 2+2?"}]
ANSWER = "The answer to this classic math problem is 4."
COMMON = {"model": "smollm2", "messages": QUESTION, "temperature": 0}


def post(http: httpx.Client, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def refused(http: httpx.Client, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def events(response: httpx.Response) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.fixture(scope="session")
def library(smollm2_path: Path) -> Iterator[LLM]:
    with LLM.load(smollm2_path) as llm:
        yield llm


def test_a_whole_answer_fits_the_schema_and_is_the_librarys(
    http: httpx.Client, shared_data: Path, library: LLM
) -> None:
    found = post(http, {**COMMON, "n": 2, "logprobs": True, "top_logprobs": 3, "metadata": {"a": "b"}})
    check(shared_data, "CreateChatCompletionResponse", found)
    expected = library.chat(QUESTION, temperature=0, logprobs=True, top_logprobs=3)
    assert [choice["message"]["content"] for choice in found["choices"]] == [expected.text] * 2 == [ANSWER] * 2
    assert found["metadata"] == {"a": "b"}
    tokens = found["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == ANSWER
    assert expected.logprobs is not None
    assert [token["logprob"] for token in tokens] == pytest.approx([t.logprob for t in expected.logprobs], abs=1e-4)
    assert all(len(token["top_logprobs"]) == 3 for token in tokens)
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(expected.prompt_ids)
    assert usage["completion_tokens"] == 2 * (len(expected.token_ids) + 1)  # the end token counts too


def test_a_stream_says_the_same_in_chunks_of_the_schema(http: httpx.Client, shared_data: Path) -> None:
    body = {**COMMON, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "n": 2}
    chunks = events(http.post("/v1/chat/completions", json=body))
    for chunk in chunks:
        check(shared_data, "CreateChatCompletionStreamResponse", chunk)
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in range(2):
        mine = [choice for choice in choices if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == ANSWER
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
    assert chunks[-1]["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["usage"] == post(http, {**COMMON, "n": 2})["usage"] | {
        "prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]
    }


def test_usage_comes_only_when_asked_for(http: httpx.Client) -> None:
    chunks = events(http.post("/v1/chat/completions", json={**COMMON, "stream": True, "max_tokens": 2}))
    assert all("usage" not in chunk for chunk in chunks)


def test_a_cached_prompt_is_told(http: httpx.Client) -> None:
    post(http, COMMON)
    usage = post(http, COMMON)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] // 32 * 32


def test_stop_and_length(http: httpx.Client) -> None:
    stopped = post(http, {**COMMON, "stop": ["classic", "4"]})["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("The answer to this ", "stop")
    cut = post(http, {**COMMON, "max_completion_tokens": 3})["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("The answer to", "length")


SAMPLED = [
    {"top_k": 5, "seed": 1},
    {"top_p": 0.7, "seed": 2},
    {"min_p": 0.2, "seed": 3},
    {"repetition_penalty": 1.3, "seed": 4},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5, "seed": 5},
    {"logit_bias": {"504": -100, "2683": 3.5}, "seed": 6},
    {"min_tokens": 20, "seed": -7},
    {"ignore_eos": True, "seed": 8},
    {"stop_token_ids": [2426], "seed": 9},
    {"allowed_token_ids": [504, 1194, 280, 451], "seed": 10},
    {"bad_words": ["answer", "the"], "seed": 11},
]


@pytest.mark.parametrize("fields", SAMPLED, ids=lambda fields: next(iter(fields)))
def test_sampling_parameters_reach_the_engine(http: httpx.Client, library: LLM, fields: dict[str, Any]) -> None:
    found = post(http, {"model": "smollm2", "messages": QUESTION, "max_tokens": 24, **fields})
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repeat_last_n": -1, "max_tokens": 24, **fields}
    if "repetition_penalty" in params:
        params["repeat_penalty"] = params.pop("repetition_penalty")
    if "logit_bias" in params:
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    if "bad_words" in params:
        encode = library.tokenizer.encode
        words = params.pop("bad_words")
        params["bad_words_ids"] = [ids for word in words for ids in (encode(word), encode(" " + word))]
    assert found["choices"][0]["message"]["content"] == library.chat(QUESTION, **params).text


def test_the_same_seed_gives_the_same_text_beside_others(http: httpx.Client) -> None:
    body = {"model": "smollm2", "messages": QUESTION, "seed": 11, "temperature": 1.2, "max_tokens": 24}
    alone = post(http, body)["choices"][0]["message"]["content"]
    others = [{**body, "seed": seed, "messages": [{"role": "user", "content": f"Story {seed}"}]} for seed in range(16)]
    with ThreadPoolExecutor(17) as pool:
        found = list(pool.map(lambda b: post(http, b)["choices"][0]["message"]["content"], [*others, body]))
    assert found[-1] == alone
    assert len(set(found)) > 8


@pytest.mark.parametrize(
    ("fields", "valid"),
    [
        ({"response_format": {"type": "json_object"}}, lambda text: isinstance(json.loads(text), dict)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "sum",
                        "strict": True,
                        "schema": {
                            "type": "object",
                            "properties": {"result": {"type": "integer", "minimum": 0, "maximum": 9}},
                            "required": ["result"],
                            "additionalProperties": False,
                        },
                    },
                }
            },
            lambda text: json.loads(text)["result"] in range(10),
        ),
        ({"structured_outputs": {"regex": "[0-9]{2}!"}}, lambda text: text[:2].isdigit() and text[2:] == "!"),
        ({"structured_outputs": {"choice": ["red", "blue"]}}, lambda text: text in ("red", "blue")),
        ({"structured_outputs": {"grammar": 'root ::= "yes" | "no"'}}, lambda text: text in ("yes", "no")),
        ({"structured_outputs": {"json": {"enum": [1, 2]}}}, lambda text: json.loads(text) in (1, 2)),
    ],
)
def test_structured_outputs(http: httpx.Client, fields: dict[str, Any], valid: Any) -> None:
    choice = post(http, {**COMMON, "max_tokens": 200, **fields})["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert valid(choice["message"]["content"])


def test_the_models_prompt_can_be_changed(http: httpx.Client) -> None:
    def rendered(**fields: Any) -> Any:
        return post(http, {**COMMON, **fields}, "/v1/chat/completions/render")

    whole = rendered()
    assert whole["prompt"].endswith("<|im_start|>assistant\n")
    assert not rendered(add_generation_prompt=False)["prompt"].endswith("<|im_start|>assistant\n")
    begun = [*QUESTION, {"role": "assistant", "content": "The sum"}]
    assert rendered(messages=begun, continue_final_message=True)["prompt"].endswith("<|im_start|>assistant\nThe sum")
    assert rendered(chat_template="{{ messages[0].content }} {{ x }}", chat_template_kwargs={"x": 7})["prompt"] == (
        "What is 2+2? 7"
    )
    assert rendered(truncate_prompt_tokens=5)["token_ids"] == whole["token_ids"][-5:]
    assert rendered(chat_template="{{ reasoning_effort }}", reasoning_effort="low")["prompt"] == "low"
    found = post(http, {**COMMON, "messages": begun, "continue_final_message": True, "max_tokens": 4})
    assert found["choices"][0]["message"]["content"].startswith(" of")


def test_prompt_logprobs(http: httpx.Client) -> None:
    found = post(http, {**COMMON, "max_tokens": 1, "prompt_logprobs": 1})
    ids = post(http, COMMON, "/v1/chat/completions/render")["token_ids"]
    assert found["prompt_logprobs"][0] is None
    assert len(found["prompt_logprobs"]) == len(ids)
    for token, entry in zip(ids[1:], found["prompt_logprobs"][1:], strict=True):
        best = max(other["logprob"] for other in entry.values())
        assert entry[str(token)]["logprob"] <= best
        assert (entry[str(token)]["rank"] == 1) == (len(entry) == 1)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"frobnicate": 1}, "frobnicate", "the field frobnicate is not known"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"stop": [""]}, "stop", "at least 1 character"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"logit_bias": {"49152": 1}}, "logit_bias", "outside the vocabulary of 49152"),
        ({"logit_bias": {"word": 1}}, "logit_bias", "match pattern"),
        ({"allowed_token_ids": [60000]}, "allowed_token_ids", "outside the vocabulary"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens", "must not exceed"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio", "answers in text"),
        ({"modalities": ["text", "audio"]}, "modalities", "answers in text"),
        ({"web_search_options": {}}, "web_search_options", "does not search"),
        ({"functions": [{"name": "f"}]}, "functions", "use tools"),
        ({"verbosity": "low"}, "verbosity", "how long the answer"),
        ({"tool_choice": "required"}, "tool_choice", "no tools to choose from"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0", "custom tools are not supported"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice",
            "'g', which is not among the tools",
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "must not set messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "exclude"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "can't be streamed"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "regular expression"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "not both",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "what"}}}},
            "response_format",
            "what",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages.0.content.0",
            "image_url can't be read",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages.0.content.0",
            "input_audio can't be read",
        ),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages.0.colour", "not known"),
        ({"chat_template": "{% if %}"}, None, "does not compile"),
        ({"chat_template": "{{ raise_exception('no') }}"}, None, "rejects the conversation: no"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    http: httpx.Client, shared_data: Path, fields: dict[str, Any], param: str | None, message: str
) -> None:
    for stream in (False, True):
        error = refused(http, {**COMMON, "stream": stream, **fields})
        check(shared_data, "ErrorResponse", {"error": error})
        assert message in error["message"]
        assert param is None or error["param"].startswith(param)


def test_a_prompt_that_is_too_long_has_openais_code(http: httpx.Client) -> None:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "a b " * 6000}]}
    assert refused(http, body)["code"] == "context_length_exceeded"


def test_an_unknown_model_is_not_found(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={**COMMON, "model": "nothing"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": NaN}', b'{"model":"\\ud800","messages":[]}'])
def test_malformed_bodies(http: httpx.Client, body: bytes) -> None:
    response = http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def leave(server: RunningServer, body: dict[str, Any], after_bytes: int) -> None:
    """Send a request and go away once so much of the response has come; for 0: as soon as the engine has it."""

    async def read() -> None:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            count = 0
            async for part in response.aiter_bytes():
                count += len(part)
                if after_bytes and count >= after_bytes:
                    return

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        task = asyncio.ensure_future(read())
        if after_bytes:
            return await task
        while not server.service.engine_thread.num_running:
            await asyncio.sleep(0.002)
        task.cancel()
        await asyncio.wait({task})
    return None


@pytest.mark.parametrize(("stream", "after_bytes"), [(False, 0), (True, 0), (True, 2000)])
def test_a_client_that_goes_away_cancels_also_during_prefill(
    server: RunningServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, stream: bool, after_bytes: int
) -> None:
    post(http, {**COMMON, "max_tokens": 1})
    engine = next(m for m in server.service.manager.loaded() if m.name.startswith("smollm2")).llm.engine
    ended: list[Any] = []
    cancel = engine.cancel

    def recorded(request_id: int) -> Any:
        ended.append(cancel(request_id))
        return ended[-1]

    monkeypatch.setattr(engine, "cancel", recorded)
    text = f"{stream} word " * 2000 if after_bytes == 0 else "Hello"  # of several steps, so the prefill still goes on
    body = {**COMMON, "messages": [{"role": "user", "content": text}], "stream": stream, "ignore_eos": True}
    asyncio.run(leave(server, body, after_bytes))
    until_idle(server)
    assert [event.finish_reason for event in ended] == ["cancelled"]


def until_idle(server: RunningServer) -> None:
    """Wait until nobody uses a model; assert that no block of a cache is lost."""
    service = server.service
    while service.engine_thread.num_running or any(model.leases for model in service.manager.loaded()):
        time.sleep(0.01)
    for model in service.manager.loaded():
        pool = model.llm.engine.scheduler.pool
        assert pool.available == pool.num_blocks


def test_an_error_in_mid_stream_is_an_event(
    server: RunningServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    post(http, COMMON)
    engine = next(m for m in server.service.manager.loaded() if m.name.startswith("smollm2")).llm.engine
    steps = iter(range(4))
    step = engine.step

    def failing() -> Any:
        if next(steps, None) is None:
            raise RuntimeError("bad weights")
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", failing)
        found = events(http.post("/v1/chat/completions", json={**COMMON, "stream": True}))
    assert "bad weights" in found[-1]["error"]["message"]
    assert found[1]["choices"][0]["delta"]["content"] == "The"
    assert post(http, COMMON)["choices"][0]["message"]["content"] == ANSWER
