"""ollama's routes about models: listed, shown, loaded, copied, deleted, created."""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from ollama_http import lines, post
from ollama_schema import OllamaSchema

from puna.store import Store


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
