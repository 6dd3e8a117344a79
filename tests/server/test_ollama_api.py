"""ollama's routes, field by field, judged by ollama's own description of them."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from ollama_schema import OllamaSchema

from puna import LLM
from puna.chat.tools import TextDelta, ToolCallArguments, ToolCallStart
from puna.server.ollama.answering import ToolCalls
from puna.server.ollama.formats import closed
from puna.server.pieces import Piece
from puna.store import Store

GREEDY = {"temperature": 0, "num_predict": 24}
SUM = "What is 2+2?"
ANSWER = "The answer to this classic math problem is 4."


def post(http: httpx.Client, path: str, status: int = 200, **body: Any) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == status, response.text
    return response.json()


def lines(http: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    response = http.post(path, json=body)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/x-ndjson"), response.text
    return [json.loads(line) for line in response.text.splitlines()]


def test_the_server_says_that_it_is_there(http: httpx.Client, ollama_schema: OllamaSchema) -> None:
    assert http.get("/").text == "Ollama is running"
    assert http.head("/").status_code == 200
    ollama_schema.check("VersionResponse", http.get("/api/version").json())


def test_generate_gives_what_the_library_gives(
    http: httpx.Client, ollama_schema: OllamaSchema, smollm2_path: Path
) -> None:
    with LLM.load(smollm2_path) as llm:
        expected = llm.chat([{"role": "user", "content": SUM}], temperature=0, max_tokens=24)
        prompt_ids = llm.prompt([{"role": "user", "content": SUM}]).ids
        whole_ids = [*prompt_ids, *llm.tokenizer.encode(expected.text)]
    answer = post(http, "/api/generate", model="smollm2", prompt=SUM, stream=False, options=GREEDY)
    ollama_schema.check("GenerateResponse", answer)
    assert answer["response"] == expected.text == ANSWER
    assert (answer["model"], answer["done"], answer["done_reason"]) == ("smollm2", True, "stop")
    assert (answer["prompt_eval_count"], answer["context"]) == (len(prompt_ids), whole_ids)
    assert answer["eval_count"] == len(whole_ids) - len(prompt_ids) + 1  # and the token that ends it
    assert datetime.fromisoformat(answer["created_at"].replace("Z", "+00:00")).tzinfo is not None
    parts = answer["load_duration"] + answer["prompt_eval_duration"] + answer["eval_duration"]
    assert 0 < parts <= answer["total_duration"] < 10**12

    streamed = lines(http, "/api/generate", model="smollm2", prompt=SUM, options=GREEDY)
    for line in streamed:
        ollama_schema.check("GenerateStreamEvent", line)
    assert [line["done"] for line in streamed] == [False] * (len(streamed) - 1) + [True]
    assert len(streamed) > 5
    assert "".join(line["response"] for line in streamed) == ANSWER
    assert streamed[-1]["context"] == whole_ids


def test_context_goes_on_as_a_chat_does(http: httpx.Client, smollm2_path: Path) -> None:
    first = post(http, "/api/generate", model="smollm2", prompt=SUM, stream=False, options=GREEDY)
    second = post(
        http,
        "/api/generate",
        model="smollm2",
        prompt="And 3+4?",
        context=first["context"],
        stream=False,
        options=GREEDY,
    )
    chat = [
        {"role": "user", "content": SUM},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "And 3+4?"},
    ]
    with LLM.load(smollm2_path) as llm:
        ids = llm.prompt(chat).ids
        assert second["context"][: len(ids)] == ids
        assert second["response"] == llm.chat(chat, temperature=0, max_tokens=24).text


def test_system_and_template_replace_the_models(http: httpx.Client) -> None:
    template = "{% for m in messages %}[{{ m.role }}: {{ m.content }}]{% endfor %}"
    body = {"model": "smollm2", "prompt": "Hi", "stream": False, "options": {"num_predict": 1}}
    plain = post(http, "/api/generate", **body, system="Be brief.", template=template)
    raw = post(http, "/api/generate", **body, raw=True) | {"response": ""}
    assert "context" not in raw
    same = post(http, "/api/generate", **{**body, "prompt": "[system: Be brief.][user: Hi]"}, raw=True)
    assert plain["prompt_eval_count"] == same["prompt_eval_count"]
    error = post(http, "/api/generate", 400, **body, template="{% for %}")
    assert "chat template does not compile" in error["error"]
    assert "exclude each other" in post(http, "/api/generate", 400, **body, raw=True, system="x")["error"]


def test_a_raw_prompt_may_spell_control_tokens(http: httpx.Client, smollm2_path: Path) -> None:
    with LLM.load(smollm2_path) as llm:
        prompt = llm.prompt([{"role": "user", "content": SUM}])
    answer = post(http, "/api/generate", model="smollm2", prompt=prompt.text, raw=True, stream=False, options=GREEDY)
    assert (answer["response"], answer["prompt_eval_count"]) == (ANSWER, len(prompt.ids))


def test_a_base_model_continues_text(http: httpx.Client) -> None:
    body = {"model": "stories", "stream": False, "options": {"temperature": 0, "num_predict": 16}}
    first = post(http, "/api/generate", **body, prompt="Once upon a time")
    assert first["response"] == ", there was a little girl named Lily. She loved to play"
    longer = post(http, "/api/generate", **body, prompt=" out", context=first["context"])
    assert longer["context"][: len(first["context"])] == first["context"]
    assert "no place for system" in post(http, "/api/generate", 400, **body, prompt="x", system="y")["error"]
    error = post(http, "/api/chat", 400, **body, messages=[{"role": "user", "content": "x"}])["error"]
    assert "no chat template" in error


def test_chat(http: httpx.Client, ollama_schema: OllamaSchema) -> None:
    messages = [{"role": "user", "content": SUM, "images": []}]
    answer = post(http, "/api/chat", model="smollm2", messages=messages, stream=False, options=GREEDY)
    ollama_schema.check("ChatResponse", answer)
    assert answer["message"] == {"role": "assistant", "content": ANSWER}
    streamed = lines(http, "/api/chat", model="smollm2", messages=messages, options={**GREEDY, "stop": ["math"]})
    for line in streamed:
        ollama_schema.check("ChatStreamEvent", line)
    assert "".join(line["message"]["content"] for line in streamed) == "The answer to this classic "
    assert streamed[-1]["done_reason"] == "stop"
    answer = post(http, "/api/chat", model="smollm2", messages=messages, stream=False, options={"num_predict": 2})
    assert (answer["done_reason"], answer["eval_count"]) == ("length", 2)


def test_the_assistants_last_message_is_continued(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": SUM}, {"role": "assistant", "content": "The answer is"}]
    answer = post(http, "/api/chat", model="smollm2", messages=messages, stream=False, options=GREEDY)
    assert answer["message"]["content"] == " 4."


def test_format(http: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "maximum": 100}, "available": {"type": "boolean"}},
        "required": ["age", "available"],
    }
    messages = [{"role": "user", "content": "Ollama is 22 years old and busy. Respond using JSON."}]
    body = {"model": "smollm2", "messages": messages, "stream": False, "options": {"temperature": 0}}
    found = json.loads(post(http, "/api/chat", **body, format=schema)["message"]["content"])
    jsonschema.validate(found, {**schema, "additionalProperties": False})
    body["options"] = {"temperature": 0, "num_predict": 8}
    assert post(http, "/api/chat", **body, format="json")["message"]["content"].lstrip().startswith("{")
    assert post(http, "/api/chat", **body, format="")["message"]["content"]
    assert "format" in post(http, "/api/chat", 400, **body, format="yaml")["error"]
    assert "JSON schema" in post(http, "/api/chat", 400, **body, format={"type": "nonsense"})["error"]


@pytest.mark.parametrize(
    ("schema", "is_closed"),
    [
        ({"properties": {"a": {}}}, True),
        ({"properties": {"a": {}}, "required": ["b"]}, False),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}, False),
        ({"type": "object"}, False),
    ],
)
def test_objects_are_closed_where_nothing_that_fits_is_lost(schema: dict[str, Any], is_closed: bool) -> None:
    assert (closed(schema).get("additionalProperties") is False) == is_closed
    nested = closed({"type": "array", "items": {"anyOf": [schema]}, "$defs": {"d": schema}})
    for part in (nested["items"]["anyOf"][0], nested["$defs"]["d"]):
        assert (part.get("additionalProperties") is False) == is_closed


def test_logprobs(http: httpx.Client, ollama_schema: OllamaSchema) -> None:
    body = {"model": "smollm2", "prompt": SUM, "options": GREEDY, "logprobs": True, "top_logprobs": 3}
    answer = post(http, "/api/generate", **body, stream=False)
    ollama_schema.check("GenerateResponse", answer)
    assert "".join(entry["token"] for entry in answer["logprobs"]) == ANSWER
    for entry in answer["logprobs"]:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"]  # greedy
    streamed = lines(http, "/api/generate", **body)
    assert [entry for line in streamed for entry in line.get("logprobs", [])] == answer["logprobs"]
    assert "top_logprobs" in post(http, "/api/generate", 400, **{**body, "logprobs": False})["error"]
    assert "less than or equal to 20" in post(http, "/api/generate", 400, **{**body, "top_logprobs": 21})["error"]


def test_load_and_unload(http: httpx.Client, ollama_schema: OllamaSchema) -> None:
    loaded = post(http, "/api/generate", model="stories", keep_alive="10m")
    ollama_schema.check("GenerateResponse", loaded)
    assert (loaded["response"], loaded["done"], loaded["done_reason"]) == ("", True, "load")
    running = http.get("/api/ps").json()
    ollama_schema.check("PsResponse", running)
    found = {model["name"]: model for model in running["models"]}["stories:latest"]
    left = datetime.fromisoformat(found["expires_at"]) - datetime.now().astimezone()
    assert 500 < left.total_seconds() <= 600
    assert found["context_length"] == 512
    unloaded = post(http, "/api/chat", model="stories", messages=[], keep_alive=0)
    ollama_schema.check("ChatResponse", unloaded)
    assert unloaded["done_reason"] == "unload"
    assert "stories:latest" not in [model["name"] for model in http.get("/api/ps").json()["models"]]
    post(http, "/api/generate", model="stories", prompt="x", keep_alive=0, stream=False, options={"num_predict": 1})
    assert "stories:latest" not in [model["name"] for model in http.get("/api/ps").json()["models"]]
    assert "keep_alive" in post(http, "/api/generate", 400, model="stories", keep_alive="soon")["error"]


def test_what_is_too_long_is_refused_unless_it_may_be_cut(http: httpx.Client) -> None:
    words = "a story of a cat " * 40
    options = {"num_ctx": 64, "num_predict": 4}
    error = post(http, "/api/generate", 400, model="stories", prompt=words, options=options)["error"]
    assert "context of 64" in error
    answer = post(http, "/api/generate", model="stories", prompt=words, options=options, truncate=True, stream=False)
    assert answer["prompt_eval_count"] == 63
    messages = [{"role": "user", "content": words}, {"role": "user", "content": "Hi"}]
    body = {"model": "smollm2", "messages": messages, "options": options, "stream": False}
    assert "context of 64" in post(http, "/api/chat", 400, **body)["error"]
    assert post(http, "/api/chat", **body, truncate=True)["prompt_eval_count"] < 64
    filled = post(http, "/api/generate", model="stories", prompt="Once", options={"num_ctx": 16}, stream=False)
    assert (filled["done_reason"], filled["prompt_eval_count"] + filled["eval_count"]) == ("length", 16)
    options = {"temperature": 0, "num_predict": 800, "num_keep": 4}
    body = {"model": "stories", "prompt": "Once", "stream": False}
    assert post(http, "/api/generate", **body, options=options)["eval_count"] < 512
    assert post(http, "/api/generate", **body, options=options, shift=True)["eval_count"] == 800
    post(http, "/api/generate", model="stories", prompt="x", shift=False, stream=False, options={"num_predict": 1})


def test_embed(http: httpx.Client, ollama_schema: OllamaSchema, shared_data: Path) -> None:
    texts = ["a cat", "a dog"]
    with LLM.load(shared_data / "weights" / "stories260K" / "stories260K.gguf") as llm:
        expected = llm.embed(texts).tolist()
        tokens = sum(len(llm.tokenizer.encode(text, add_bos=llm.tokenizer.add_bos)) for text in texts)
    answer = post(http, "/api/embed", model="stories", input=texts)
    ollama_schema.check("EmbedResponse", answer)
    assert answer["embeddings"] == [pytest.approx(vector, abs=1e-6) for vector in expected]
    assert answer["prompt_eval_count"] == tokens
    assert 0 < answer["load_duration"] < answer["total_duration"]
    single = post(http, "/api/embed", model="stories", input="a cat", dimensions=8)["embeddings"]
    assert len(single[0]) == 8
    assert sum(x * x for x in single[0]) == pytest.approx(1)
    assert single[0][0] / single[0][1] == pytest.approx(expected[0][0] / expected[0][1])
    assert post(http, "/api/embeddings", model="stories", prompt="a cat") == {"embedding": answer["embeddings"][0]}
    assert post(http, "/api/embeddings", model="stories") == {"embedding": []}
    assert post(http, "/api/embed", model="stories", input=[])["embeddings"] == []
    assert "at most 64" in post(http, "/api/embed", 400, model="stories", input="a", dimensions=65)["error"]
    long = "a cat and a dog " * 50
    assert "truncate" in post(http, "/api/embed", 400, model="stories", input=long, options={"num_ctx": 32})["error"]
    cut = post(http, "/api/embed", model="stories", input=long, options={"num_ctx": 32}, truncate=True)
    assert cut["prompt_eval_count"] == 32


def test_stored_models(http: httpx.Client, ollama_schema: OllamaSchema, model_store: Store) -> None:
    listed = http.get("/api/tags").json()
    ollama_schema.check("ListResponse", listed)
    for model in listed["models"]:
        ollama_schema.check("ModelSummary", model)
    found = {model["name"]: model for model in listed["models"]}["smollm2:latest"]
    manifest = model_store.find("smollm2")
    assert (found["size"], found["digest"]) == (manifest.size, manifest.content_digest)
    assert found["details"] == {
        "parent_model": "",
        "format": "gguf",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": "134.52M",
        "quantization_level": "Q4_1",
    }


def test_show(http: httpx.Client, ollama_schema: OllamaSchema) -> None:
    shown = post(http, "/api/show", model="smollm2")
    ollama_schema.check("ShowResponse", shown)
    assert "completion" in shown["capabilities"]
    info = shown["model_info"]
    assert (info["general.parameter_count"], info["llama.block_count"]) == (134515008, 30)
    assert info["tokenizer.ggml.tokens"] is None
    assert "<|im_start|>" in shown["template"]
    assert shown["template"] in shown["modelfile"]
    verbose = post(http, "/api/show", name="smollm2", verbose=True)["model_info"]
    assert len(verbose["tokenizer.ggml.tokens"]) == 49152


def test_copy_and_delete(http: httpx.Client, model_store: Store) -> None:
    assert http.post("/api/copy", json={"source": "stories", "destination": "me/tales:v1"}).status_code == 200
    assert post(http, "/api/generate", model="me/tales:v1")["done_reason"] == "load"
    assert "exists already" in post(http, "/api/copy", 409, source="smollm2", destination="me/tales:v1")["error"]
    assert "not a model name" in post(http, "/api/copy", 400, source="smollm2", destination="../x")["error"]
    assert "missing" in post(http, "/api/copy", 404, source="missing", destination="x")["error"]
    assert http.request("DELETE", "/api/delete", json={"model": "me/tales:v1"}).status_code == 200
    assert http.request("DELETE", "/api/delete", json={"model": "me/tales:v1"}).status_code == 404
    assert "me/tales:v1" not in [model["name"] for model in http.get("/api/ps").json()["models"]]
    assert model_store.find("stories")


def test_thinking_is_refused_where_there_is_none(http: httpx.Client) -> None:
    body = {"model": "smollm2", "prompt": SUM, "stream": False, "options": {"num_predict": 1}}
    for think in (True, "high"):
        assert "does not support thinking" in post(http, "/api/generate", 400, **body, think=think)["error"]
    assert "thinking" not in post(http, "/api/generate", **body, think=False)


def test_reasoning_is_told_apart(http: httpx.Client, ollama_schema: OllamaSchema) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% if enable_thinking %}<think>{% endif %}"
    )
    body = {"model": "smollm2", "prompt": "Hi", "template": template, "options": {"temperature": 0, "num_predict": 6}}
    thought = post(http, "/api/generate", **body, think="low", stream=False)
    ollama_schema.check("GenerateResponse", thought)
    assert (bool(thought["thinking"]), thought["response"]) == (True, "")
    streamed = lines(http, "/api/generate", **body, think=True)
    assert "".join(line.get("thinking", "") for line in streamed) == thought["thinking"]
    assert post(http, "/api/generate", **body, think=False, stream=False)["response"]
    for other in ({"raw": True}, {"context": [1]}):
        error = post(
            http,
            "/api/generate",
            400,
            **{**body, "template": template if "context" in other else None},
            **other,
            think=True,
        )
        assert "exclude each other" in error["error"]
    assert "thinking" in post(http, "/api/generate", 400, model="stories", prompt="x", think=True)["error"]
    made = post(http, "/api/create", model="thinker", **{"from": "smollm2"}, template=template, stream=False)
    assert made == {"status": "success"}
    assert "thinking" in post(http, "/api/show", model="thinker")["capabilities"]
    messages = [{"role": "user", "content": "Hi"}]
    chat = post(
        http, "/api/chat", model="thinker", messages=messages, think=True, stream=False, options=body["options"]
    )
    ollama_schema.check("ChatResponse", chat)
    assert chat["message"] == {"role": "assistant", "content": "", "thinking": thought["thinking"]}
    assert http.request("DELETE", "/api/delete", json={"model": "thinker"}).status_code == 200


def test_calls_are_given_out_when_they_are_whole() -> None:
    calls = ToolCalls()
    assert calls.take(Piece(0, [ToolCallStart(0, "a", "f"), ToolCallArguments(0, '{"x":')])) == ([], "")
    whole, lost = calls.take(Piece(0, [ToolCallArguments(0, " 1}"), ToolCallStart(1, "b", "g")]))
    assert (whole, lost) == ([{"id": "a", "function": {"index": 0, "name": "f", "arguments": {"x": 1}}}], "")
    whole, lost = calls.take(Piece(0, [TextDelta("and")]))
    assert (whole, lost) == ([{"id": "b", "function": {"index": 1, "name": "g", "arguments": {}}}], "")
    broken = [ToolCallStart(2, "c", "h"), ToolCallArguments(2, '{"y": "')]
    assert calls.take(Piece(0, broken, finish_reason="length")) == ([], 'h{"y": "')


def test_what_cannot_be_honoured_is_refused(http: httpx.Client) -> None:
    hello = {"role": "user", "content": "Hi"}
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        ("/api/generate", {"model": "smollm2", "prompt": "x", "images": ["aGk="]}, 400, "images"),
        ("/api/chat", {"model": "smollm2", "messages": [{**hello, "images": ["aGk="]}]}, 400, "images"),
        ("/api/generate", {"model": "smollm2", "prompt": "x", "suffix": "y"}, 400, "does not support insert"),
        ("/api/generate", {"model": "smollm2", "prompt": "x", "width": 3}, 400, "the field width is not known"),
        ("/api/generate", {"model": "smollm2", "prompt": "x", "options": {"warmth": 1}}, 400, "warmth"),
        ("/api/generate", {"model": "smollm2", "prompt": "x", "options": {"top_p": "a"}}, 400, "top_p"),
        ("/api/generate", {"model": "smollm2", "prompt": "x", "context": [10**9]}, 400, "token id"),
        ("/api/generate", {"prompt": "x"}, 400, "the field model is missing"),
        ("/api/chat", {"model": "smollm2", "messages": [{"role": "king", "content": "x"}]}, 400, "messages[0].role"),
        ("/api/chat", {"model": "smollm2", "messages": [{**hello, "mood": 1}]}, 400, "messages.0.mood"),
        ("/api/chat", {"model": "smollm2", "messages": [hello], "tools": [{"type": "x"}]}, 400, "tools.0"),
        ("/api/generate", {"model": "missing", "prompt": "x"}, 404, "no model missing"),
        ("/api/show", {}, 400, "model is missing"),
        ("/api/push", {"model": "smollm2"}, 400, "puna convert"),
    ]
    for path, body, status, expected in cases:
        assert expected in post(http, path, status, **body)["error"], (path, body)


def test_any_content_type_is_json(http: httpx.Client) -> None:
    body = json.dumps({"model": "stories", "prompt": "Once", "stream": False, "options": {"num_predict": 1}})
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"):
        response = http.post("/api/generate", content=body, headers={"content-type": kind})
        assert response.status_code == 200, response.text
    broken = http.post("/api/generate", content=body[:-1])
    assert broken.status_code == 400
    assert broken.json()["error"].startswith("the body is not JSON")


def test_what_the_ollama_command_sends(http: httpx.Client) -> None:
    """It is written in Go, whose JSON has fields that were never set: empty texts, null."""
    empty = {"system": "", "template": "", "options": None}
    assert post(http, "/api/show", model="smollm2", name="", **empty)["details"]["family"] == "llama"
    assert post(http, "/api/generate", model="smollm2", prompt="", suffix="", **empty)["done_reason"] == "load"
    body = {**empty, "options": {"num_predict": 1}, "context": None, "format": None, "suffix": ""}
    assert lines(http, "/api/generate", model="smollm2", prompt="Hi", **body)[-1]["done"]
    message = {"role": "User", "content": "Hi"}
    assert lines(http, "/api/chat", model="smollm2", messages=[message], format=None, options={"num_predict": 1})
    assert http.post("/api/copy", json={"source": "stories", "destination": "gone"}).status_code == 200
    assert http.request("DELETE", "/api/delete", json={"model": "gone", "name": ""}).status_code == 200
    pull = {"model": "missing", "username": "", "password": "", "name": "", "stream": False}
    assert "no model named" in post(http, "/api/pull", 404, **pull)["error"]
    assert "username" in post(http, "/api/pull", 400, **{**pull, "username": "me"})["error"]


def test_seeds_repeat(http: httpx.Client) -> None:
    body = {"model": "stories", "prompt": "Once", "stream": False}
    options = {"seed": 3, "temperature": 1.5, "num_predict": 12}
    first, second = (post(http, "/api/generate", **body, options=options)["response"] for _ in range(2))
    other = post(http, "/api/generate", **body, options={**options, "seed": 4})["response"]
    assert first == second != other


def test_the_same_seed_gives_the_same_text_beside_31_others(http: httpx.Client) -> None:
    def ask(seed: int, stream: bool) -> str:
        options = {"seed": seed, "temperature": 1.5, "num_predict": 24}
        body: dict[str, Any] = {"model": "stories", "prompt": "Once " * (1 + seed % 3), "options": options}
        if stream:
            return "".join(line["response"] for line in lines(http, "/api/generate", **body))
        text: str = post(http, "/api/generate", **body, stream=False)["response"]
        return text

    alone = [ask(seed, False) for seed in (3, 4)]
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, range(32), [False, True] * 16))
    assert found[3:5] == alone
    assert len(set(found)) > 16


def test_the_documentation_has_every_route(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path in ("generate", "chat", "embed", "embeddings", "tags", "ps", "show", "copy", "delete", "pull", "push"):
        assert f"/api/{path}" in document["paths"]
    body = document["components"]["schemas"]["GenerateBody"]
    assert body["additionalProperties"] is False
    assert {"model", "prompt", "suffix", "keep_alive", "think", "top_logprobs"} <= body["properties"].keys()


def test_suffix_needs_a_template_with_a_place_for_it(http: httpx.Client) -> None:
    template = "{{ if .Suffix }}<PRE> {{ .Prompt }} <SUF>{{ .Suffix }} <MID>{{ else }}{{ .Prompt }}{{ end }}"
    body = {"model": "smollm2", "stream": False, "options": {"temperature": 0, "num_predict": 4}}
    filled = post(http, "/api/generate", **body, prompt="def f():", suffix="return x", template=template)
    same = post(http, "/api/generate", **body, prompt="<PRE> def f(): <SUF>return x <MID>", raw=True)
    assert filled["response"] == same["response"]
    assert filled["prompt_eval_count"] == same["prompt_eval_count"]
    without = "{{ .Prompt }}"
    error = post(http, "/api/generate", 400, **body, prompt="x", suffix="y", template=without)["error"]
    assert "does not support insert" in error


def test_create_from_a_model(http: httpx.Client, ollama_schema: OllamaSchema, model_store: Store) -> None:
    described = {
        "from": "smollm2",
        "system": "You are Mario.",
        "template": "{{ range .Messages }}[{{ .Role }}: {{ .Content }}]{{ end }}",
        "parameters": {"temperature": 0, "num_predict": 3, "num_ctx": 256, "stop": ["]"]},
        "license": ["First.", "Second."],
        "messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Mario!"}],
    }
    statuses = lines(http, "/api/create", model="mario", **described)
    for line in statuses:
        ollama_schema.check("StatusEvent", line)
    assert statuses[-1] == {"status": "success"}
    shown = post(http, "/api/show", model="mario")
    ollama_schema.check("ShowResponse", shown)
    assert (shown["system"], shown["template"]) == (described["system"], described["template"])
    assert (shown["messages"], shown["license"]) == (described["messages"], "First.\n\nSecond.")
    assert shown["details"]["parent_model"] == "smollm2:latest"
    assert "FROM mario:latest" in shown["modelfile"]
    assert shown["parameters"].splitlines()[0].split() == ["temperature", "0"]
    answer = post(http, "/api/chat", model="mario", messages=[{"role": "user", "content": "Hi"}], stream=False)
    raw = "[system: You are Mario.][user: Who?][assistant: Mario!][user: Hi]"
    same = post(http, "/api/generate", model="mario", prompt=raw, raw=True, stream=False)
    assert answer["prompt_eval_count"] == same["prompt_eval_count"]
    assert answer["eval_count"] <= 3
    running = {model["name"]: model for model in http.get("/api/ps").json()["models"]}
    assert running["mario:latest"]["context_length"] == 256
    assert http.request("DELETE", "/api/delete", json={"model": "mario"}).status_code == 200
    assert model_store.find("smollm2")


def test_create_from_files(http: httpx.Client, shared_data: Path) -> None:
    content = (shared_data / "weights" / "stories260K" / "stories260K.gguf").read_bytes() + bytes(1)
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    missing = post(http, "/api/create", 400, model="sent", files={"a.gguf": digest})["error"]
    assert "send it first to /api/blobs" in missing
    assert http.post(f"/api/blobs/{digest}", content=content).status_code == 201
    assert post(http, "/api/create", model="sent", files={"a.gguf": digest}, stream=False) == {"status": "success"}
    body = {"model": "sent", "prompt": "Once", "stream": False, "options": {"num_predict": 2}}
    assert post(http, "/api/generate", **body)["eval_count"] == 2
    assert http.request("DELETE", "/api/delete", json={"model": "sent"}).status_code == 200
    assert http.head(f"/api/blobs/{digest}").status_code == 404


def test_create_quantizes(http: httpx.Client, ollama_schema: OllamaSchema, model_store: Store) -> None:
    """With the statuses of ollama's own documentation; what it is made from stays as it was."""
    before = model_store.find("stories")
    statuses = lines(http, "/api/create", **{"model": "small", "from": "stories", "quantize": "q8_0"}, system="Short.")
    for line in statuses:
        ollama_schema.check("StatusEvent", line)
    quantizing = [line for line in statuses if line["status"] == "quantizing F32 model to Q8_0"]
    assert quantizing[0] == {"status": "quantizing F32 model to Q8_0"}
    assert len(quantizing) > 1
    for line in quantizing[1:]:
        assert line["digest"] == "0"
        assert 0 <= line["completed"] <= line["total"]
    made = model_store.find("small")
    rest = [line["status"] for line in statuses if line not in quantizing]
    assert rest == [f"creating new layer sha256:{made.files[0].sha256}", "writing manifest", "success"]
    shown = post(http, "/api/show", model="small")
    assert (shown["details"]["quantization_level"], shown["details"]["parent_model"]) == ("Q8_0", "stories:latest")
    assert (shown["system"], shown["details"]["format"]) == ("Short.", "gguf")
    body = {"model": "small", "prompt": "Once", "stream": False, "options": {"num_predict": 2}}
    assert post(http, "/api/generate", **body)["eval_count"] == 2
    assert model_store.find("stories") == before
    assert model_store.verify() == []
    assert http.request("DELETE", "/api/delete", json={"model": "small"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        ({}, 400, "from"),
        ({"from": "missing"}, 404, "no model missing"),
        ({"from": "smollm2", "quantize": "q8_0"}, 400, "quantization is only supported for F16 and F32 models"),
        ({"from": "stories", "quantize": "q9_0"}, 400, "unknown quantization type 'q9_0'"),
        ({"from": "stories", "quantize": "f16"}, 400, "F16 is not a quantized type"),
        ({"from": "stories", "renderer": "x"}, 400, "renderer"),
        ({"from": "stories", "template": "{{ if"}, 400, "template"),
        ({"from": "stories", "parameters": {"warmth": 1}}, 400, "warmth"),
        ({"from": "stories", "messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role"),
        ({"from": "stories", "adapters": {"a.gguf": "sha256:" + "0" * 64}}, 400, "no blob"),
        ({"files": {"../a.gguf": "sha256:" + "0" * 64}}, 400, "unusual characters"),
        ({"from": "/etc/passwd"}, 404, "not a model name"),
        ({"model": "../x", "from": "stories"}, 400, "not a model name"),
    ],
)
def test_what_create_refuses(http: httpx.Client, body: dict[str, Any], status: int, expected: str) -> None:
    for stream in (True, False):
        assert expected in post(http, "/api/create", status, **{"model": "refused", **body, "stream": stream})["error"]
    assert http.post("/api/show", json={"model": "refused"}).status_code == 404
