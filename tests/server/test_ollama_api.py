"""ollama's API as a whole: what its clients send, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import httpx
from ollama_http import lines, post
from ollama_schema import OllamaSchema


def test_the_server_says_that_it_is_there(http: httpx.Client, ollama_schema: OllamaSchema) -> None:
    assert http.get("/").text == "Ollama is running"
    assert http.head("/").status_code == 200
    ollama_schema.check("VersionResponse", http.get("/api/version").json())


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


def test_the_documentation_has_every_route(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path in ("generate", "chat", "embed", "embeddings", "tags", "ps", "show", "copy", "delete", "pull", "push"):
        assert f"/api/{path}" in document["paths"]
    body = document["components"]["schemas"]["GenerateBody"]
    assert body["additionalProperties"] is False
    assert {"model", "prompt", "suffix", "keep_alive", "think", "top_logprobs"} <= body["properties"].keys()
