"""Answers of ollama's routes, field by field, judged by ollama's own description and by the library's answers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from ollama_http import ANSWER, GREEDY, SUM, lines, post
from ollama_schema import OllamaSchema

from puna import LLM
from puna.chat.tools import TextDelta, ToolCallArguments, ToolCallStart
from puna.server.ollama.answering import ToolCalls
from puna.server.ollama.formats import closed
from puna.server.pieces import Piece


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
