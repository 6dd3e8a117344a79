"""Requests made up from our own OpenAPI: whatever comes, the server answers, and never with a 500."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import RunningServer
from schemathesis.checks import not_a_server_error

PATHS = (
    "/v1/models",
    "/v1/chat/completions",
    "/v1/chat/completions/render",
    "/v1/completions",
    "/v1/completions/render",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
    "/v1/responses",
    "/v1/moderations",
    "/v1/batches",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def bounded(body: Any) -> Any:
    """A made-up request that reaches the model: of a model that is there, with an end that is near."""
    if isinstance(body, dict):
        if "model" in body:
            body["model"] = "stories"
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "n", "best_of"):
            if isinstance(body.get(name), int):
                body[name] = min(body[name], 4)
        if "messages" in body and "chat_template" in body:  # the model has none of its own
            body["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
            body.setdefault("max_tokens", 4)
    return body


@pytest.mark.parametrize("path", PATHS)
def test_no_request_makes_the_server_fail(server: RunningServer, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path]["POST" if "POST" in schema[path] else "GET"]

    @QUICK
    @given(case=operation.as_strategy(), reach=st.booleans())
    def check(case: Any, reach: bool) -> None:
        if reach:
            case.body = bounded(case.body)
        response = case.call(base_url=server.url)
        case.validate_response(response, checks=[not_a_server_error])

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("path", PATHS[1:])
def test_no_field_of_a_wrong_type_makes_the_server_fail(server: RunningServer, http: httpx.Client, path: str) -> None:
    properties = _properties(server, path)

    @QUICK
    @given(data=st.data(), name=st.sampled_from(sorted(properties)))
    def check(data: st.DataObject, name: str) -> None:
        body: dict[str, Any] = {"model": "stories", "prompt": "a", "max_tokens": 2, "input": "a", "tokens": [1]}
        body |= {"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ messages }}"}
        body = {key: value for key, value in body.items() if key in properties} | {name: data.draw(JSON)}
        try:
            response = http.post(path, json=body)
        except ValueError:  # the client can't write it
            return
        assert response.status_code < 500, response.text

    check()


def _properties(server: RunningServer, path: str) -> set[str]:
    document = server.app.openapi()
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    return set(document["components"]["schemas"][reference.rpartition("/")[2]]["properties"])
