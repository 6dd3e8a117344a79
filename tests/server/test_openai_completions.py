"""/v1/completions, /v1/models and vLLM's routes for tokens: against OpenAI's schema and the library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai_schemas import check

from puna.llm import LLM

COMMON = {"model": "stories", "prompt": "Once upon", "temperature": 0, "max_tokens": 8}


def post(http: httpx.Client, body: dict[str, Any], path: str = "/v1/completions") -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.fixture(scope="module")
def library(shared_data: Path) -> Iterator[LLM]:
    with LLM.load(shared_data / "weights" / "stories260K" / "stories260K.gguf") as llm:
        yield llm


def test_prompts_as_texts_and_as_tokens(http: httpx.Client, shared_data: Path, library: LLM) -> None:
    texts = ["Once upon", "The cat"]
    expected = [library.generate(text, temperature=0, max_tokens=8).text for text in texts]
    ids = [library.encode(text) for text in texts]
    for prompt, wanted in ((texts, expected), (ids, expected), (texts[0], expected[:1]), (ids[1], expected[1:])):
        found = post(http, {**COMMON, "prompt": prompt})
        check(shared_data, "CreateCompletionResponse", found)
        assert [choice["text"] for choice in found["choices"]] == wanted
        assert [choice["index"] for choice in found["choices"]] == list(range(len(wanted)))
        assert found["usage"]["completion_tokens"] == 8 * len(wanted)


def test_a_long_prompt_of_tokens_is_one_prompt(http: httpx.Client) -> None:
    found = post(http, {**COMMON, "prompt": [1] + [300] * 500, "n": 5, "max_tokens": 1})
    assert found["usage"]["prompt_tokens"] == 501
    assert len(found["choices"]) == 5


def test_sixteen_tokens_unless_asked_otherwise(http: httpx.Client) -> None:
    found = post(http, {"model": "stories", "prompt": "Once upon"})
    assert found["usage"]["completion_tokens"] == 16


def test_n_answers_of_several_prompts_keep_their_places(http: httpx.Client) -> None:
    body = {**COMMON, "temperature": 1.5, "seed": 3, "n": 2}
    both = post(http, {**body, "prompt": ["Once upon", "The cat"]})
    one = [post(http, {**body, "prompt": prompt}) for prompt in ("Once upon", "The cat")]
    texts = [choice["text"] for choice in both["choices"]]
    assert texts == [choice["text"] for found in one for choice in found["choices"]]
    assert len(set(texts)) == 4
    assert both["usage"]["prompt_tokens"] == sum(found["usage"]["prompt_tokens"] for found in one)


def test_a_stream_says_the_same(http: httpx.Client, shared_data: Path) -> None:
    body = {**COMMON, "prompt": ["Once upon", "The cat"], "logprobs": 2, "echo": True}
    whole = post(http, body)
    response = http.post("/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert chunks[-1]["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for expected in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in mine) == expected["text"]
        assert mine[-1]["finish_reason"] == "length"
        for key, values in expected["logprobs"].items():
            assert [value for choice in mine if choice["logprobs"] for value in choice["logprobs"][key]] == values


def test_echo_with_logprobs_scores_the_prompt_as_the_library_does(http: httpx.Client, library: LLM) -> None:
    found = post(http, {**COMMON, "prompt": "Once upon a time", "max_tokens": 0, "echo": True, "logprobs": 1})
    choice = found["choices"][0]
    assert choice["text"] == "Once upon a time"
    assert found["usage"]["completion_tokens"] == 0
    logprobs = choice["logprobs"]
    expected = library.score("Once", " upon a time")
    assert sum(logprobs["token_logprobs"][-3:]) == pytest.approx(expected.logprob, abs=1e-3)
    assert logprobs["token_logprobs"][0] is None
    ends = [*logprobs["text_offset"][1:], len(choice["text"])]
    parts = [choice["text"][a:b] for a, b in zip(logprobs["text_offset"], ends, strict=True)]
    assert parts == ["", "Once", " upon", " a", " time"]


def test_logprobs_without_echo_start_at_the_answer(http: httpx.Client, shared_data: Path) -> None:
    found = post(http, {**COMMON, "logprobs": 2})
    check(shared_data, "CreateCompletionResponse", found)
    logprobs = found["choices"][0]["logprobs"]
    assert logprobs["text_offset"][0] == 0
    assert "".join(logprobs["tokens"]) == found["choices"][0]["text"]
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))


def test_the_best_of_several_is_the_one_that_the_model_finds_most_probable(http: httpx.Client) -> None:
    body = {**COMMON, "temperature": 1.5, "seed": 5, "n": 4, "logprobs": 0}
    all_four = post(http, body)["choices"]

    def mean(choice: Any) -> float:
        values: list[float] = choice["logprobs"]["token_logprobs"]
        return sum(values) / len(values)

    best = post(http, {**body, "n": 2, "best_of": 4})["choices"]
    assert [choice["text"] for choice in best] == [c["text"] for c in sorted(all_four, key=mean, reverse=True)[:2]]
    assert [choice["index"] for choice in best] == [0, 1]


def test_prompt_logprobs_and_truncation(http: httpx.Client, library: LLM) -> None:
    ids = library.encode("Once upon a time")
    found = post(http, {**COMMON, "prompt": ids, "prompt_logprobs": 0, "truncate_prompt_tokens": 3})
    shown = found["choices"][0]["prompt_logprobs"]
    assert shown[0] is None
    assert [int(token) for entry in shown[1:] for token in entry] == ids[-2:]
    assert found["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"suffix": "the end"}, "suffix", "no place for one"),
        ({"best_of": 1, "n": 2}, "best_of", "at least n"),
        ({"best_of": 3, "stream": True}, "best_of", "can't be streamed"),
        ({"prompt": [1, 512]}, "prompt", "outside the vocabulary of 512"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": [[]]}, "prompt", "at least 1 item"),
        ({"prompt": ["a"] * 3000}, "prompt", "at most 2048"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"messages": []}, "messages", "not known"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    http: httpx.Client, fields: dict[str, Any], param: str, message: str
) -> None:
    response = http.post("/v1/completions", json={**COMMON, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["param"].startswith(param)


def test_models_are_listed_and_found_by_any_name(http: httpx.Client, shared_data: Path) -> None:
    listed = http.get("/v1/models").json()
    check(shared_data, "ListModelsResponse", listed)
    assert {"smollm2:latest", "stories:latest"} <= {model["id"] for model in listed["data"]}
    for name in ("stories", "stories:latest"):
        model = http.get(f"/v1/models/{name}").json()
        check(shared_data, "Model", model)
        assert model in listed["data"]
    assert http.get("/v1/models/nothing").status_code == 404


def test_tokens_of_a_text(http: httpx.Client, library: LLM) -> None:
    found = post(http, {"model": "stories", "prompt": "Once </s>", "return_token_strs": True}, "/tokenize")
    assert found["tokens"] == library.encode("Once </s>", parse_special=True)
    assert found["token_strs"] == [library.tokenizer.id_to_token(token) for token in found["tokens"]]
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), library.context_length)
    bare = post(http, {"model": "stories", "prompt": "Once", "add_special_tokens": False}, "/tokenize")
    assert bare["tokens"] == library.tokenizer.encode("Once")
    assert post(http, {"model": "stories", "tokens": bare["tokens"]}, "/detokenize") == {"prompt": "Once"}


def test_tokens_of_a_conversation_are_what_a_chat_completion_reads(http: httpx.Client) -> None:
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}]}
    rendered = post(http, body, "/v1/chat/completions/render")
    assert post(http, body, "/tokenize")["tokens"] == rendered["token_ids"]
    text = post(http, {"model": "smollm2", "tokens": rendered["token_ids"]}, "/detokenize")["prompt"]
    assert text == rendered["prompt"]
    usage = post(http, {**body, "max_tokens": 1}, "/v1/chat/completions")["usage"]
    assert usage["prompt_tokens"] == len(rendered["token_ids"])


def test_rendered_completions(http: httpx.Client, library: LLM) -> None:
    found = post(http, {**COMMON, "prompt": ["Once", "The cat"]}, "/v1/completions/render")
    assert [one["token_ids"] for one in found] == [library.encode(text) for text in ("Once", "The cat")]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/tokenize", {}, "either prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, "either prompt or messages"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}]}, "no chat template"),
        ("/detokenize", {"tokens": [512]}, "outside the vocabulary"),
        ("/detokenize", {"tokens": [-1]}, "greater than or equal to 0"),
    ],
)
def test_bad_requests_for_tokens(http: httpx.Client, path: str, body: dict[str, Any], message: str) -> None:
    response = http.post(path, json={"model": "stories", **body})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
