"""Clients that leave, read slowly or send nonsense: nothing is lost, nothing is left behind, no 500."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import RunningServer
from schemathesis.checks import not_a_server_error

from puna.server.ollama.bodies import ChatBody, CopyBody, EmbedBody, GenerateBody, ShowBody

ENDLESS = {"model": "stories", "prompt": "Once", "options": {"temperature": 2, "top_k": 0, "top_p": 1}}
ROUTES = ("generate", "chat", "embed", "embeddings", "show", "copy", "pull", "push", "create")


def send(server: RunningServer, path: str, body: Any, receive_buffer: int | None = None) -> socket.socket:
    """A request whose answer nobody reads yet."""
    address = httpx.URL(server.url)
    client = socket.socket()
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect((address.host, address.port))
    content = json.dumps(body).encode()
    client.sendall(
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(content)) + content
    )
    return client


def test_a_client_that_leaves_in_the_middle_of_an_answer_ends_it(
    own: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with httpx.stream("POST", own.url + "/api/generate", json=ENDLESS, timeout=60) as response:
        assert json.loads(next(response.iter_lines()))["done"] is False
        (model,) = own.service.manager.loaded()
        monkeypatch.setattr(model.llm.engine, "step", list)  # from now on, no answer would ever end by itself
    own.until(lambda service: service.engine_thread.num_running == 0)
    pool = model.llm.engine.scheduler.pool
    assert pool.available == pool.num_blocks
    assert model.leases == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_prompt_is_read_ends_that(
    own: RunningServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    httpx.post(own.url + "/api/generate", json={"model": "stories"}, timeout=60)
    (model,) = own.service.manager.loaded()
    monkeypatch.setattr(model.llm.engine, "step", list)
    client = send(own, "/api/generate", {**ENDLESS, "stream": stream})
    own.until(lambda service: service.engine_thread.num_running == 1)
    client.close()
    own.until(lambda service: service.engine_thread.num_running == 0 and model.leases == 0)


def test_a_client_that_leaves_while_the_model_loads_leaves_the_model(
    own: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = own.service.manager
    begun, go_on = threading.Event(), threading.Event()
    load = manager._load_llm

    def slow_load(*given: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return load(*given)

    monkeypatch.setattr(manager, "_load_llm", slow_load)
    client = send(own, "/api/generate", ENDLESS)
    assert begun.wait(60)
    client.close()
    go_on.set()
    own.until(lambda service: bool(service.manager.loaded()))
    own.until(lambda service: service.engine_thread.num_running == 0 and not manager.loaded()[0].leases)


def test_a_slow_reader_holds_nobody_up(own: RunningServer) -> None:
    slow = send(own, "/api/generate", {**ENDLESS, "logprobs": True, "top_logprobs": 20}, receive_buffer=1024)
    body = {**ENDLESS, "stream": False, "options": {"num_predict": 8}}
    for _ in range(3):
        assert httpx.post(own.url + "/api/generate", json=body, timeout=60).status_code == 200
    slow.close()
    own.until(lambda service: service.engine_thread.num_running == 0 and not service.manager.loaded()[0].leases)


def test_a_model_that_is_unloaded_tells_those_who_wait(own: RunningServer) -> None:
    with httpx.stream("POST", own.url + "/api/generate", json=ENDLESS, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        (model,) = own.service.manager.loaded()
        engine_thread = own.service.engine_thread
        engine_thread.post(lambda: engine_thread.deliver(model.llm.engine, engine_thread._cancel_all(model.llm.engine)))
        assert "unloaded" in json.loads(list(lines)[-1])["error"]


def test_a_failure_in_the_middle_of_an_answer_is_its_last_line(
    own: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with httpx.stream("POST", own.url + "/api/generate", json=ENDLESS, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        (model,) = own.service.manager.loaded()
        monkeypatch.setattr(model.llm.engine, "step", lambda: 1 / 0)
        last = json.loads(list(lines)[-1])
    assert last == {"error": "the model failed: ZeroDivisionError: division by zero"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [field for body in (GenerateBody, ChatBody, EmbedBody, ShowBody, CopyBody) for field in body.model_fields]
OPTIONS = ("num_ctx", "num_predict", "temperature", "top_k", "top_p", "stop", "seed", "repeat_penalty", "num_keep")
bodies = st.dictionaries(
    st.sampled_from(FIELDS),
    json_values
    | st.just("stories")
    | st.fixed_dictionaries({"num_predict": st.just(1), "seed": st.integers()})
    | st.dictionaries(st.sampled_from(OPTIONS), st.integers(-3, 40) | json_values, max_size=3)
    | st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "tool"]), "content": st.text(max_size=5)}),
        max_size=2,
    ),
    max_size=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(route=st.sampled_from(ROUTES), body=bodies)
def test_no_body_breaks_the_server(http: httpx.Client, route: str, body: dict[str, Any]) -> None:
    if "model" in body or "name" in body:
        body["model"] = "stories"
        body.pop("name", None)
    if route in ("create", "copy"):
        body |= {"model": "../x"} if route == "create" else {"source": "stories", "destination": "../x"}
    response = http.post(f"/api/{route}", content=json.dumps(body))
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        assert isinstance(response.json()["error"], str)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"\xff\xfe",
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": "stories", "prompt": "\\ud800", "options": {"num_predict": 1}}',
        b'{"model": "stories", "prompt": "x", "options": {"num_predict": 1e999}}',
        b'{"model": "stories", "prompt": "x", "options": {"temperature": NaN}}',
        b'{"model": "stories", "prompt": "x", "format": ' + b'{"items":' * 400 + b"{}" + b"}" * 400 + b"}",
        b'{"model": "stories", "prompt": "x", "options": ' + b"[" * 100_000,
        b'{"model": "smollm2", "messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f", '
        b'"parameters": {"a": "\\ud800"}}}], "options": {"num_ctx": 64, "num_predict": 1}}',
        b'{"model": "smollm2", "messages": [{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f", '
        b'"parameters": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b'}}], "options": {"num_ctx": 64, "num_predict": 1}}',
        b'{"model": "smollm2", "prompt": "x", "template": "'
        + b"{{ (" * 2000
        + b'", "options": {"num_ctx": 64, "num_predict": 1}}',
        b'{"model": "stories", "keep_alive": "' + b"9" * 400 + b'h"}',
    ],
    ids=lambda content: content[:40].decode("latin-1"),
)
@pytest.mark.parametrize("route", ["generate", "chat"])
def test_hostile_bodies(http: httpx.Client, route: str, content: bytes) -> None:
    response = http.post(f"/api/{route}", content=content)
    assert response.status_code < 500, response.text


# Not pull, which would ask real servers, nor delete, which would take the other tests' models.
SAFE = ("generate", "chat", "embed", "embeddings", "show", "copy", "create", "push", "tags", "ps", "version")


@pytest.mark.parametrize("path", [f"/api/{name}" for name in SAFE] + ["/api/blobs/{digest}"])
def test_requests_made_up_from_our_description(server: RunningServer, path: str) -> None:
    schema = schemathesis.openapi.from_dict(server.app.openapi())

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(data=st.data(), reach=st.booleans())
    def check(data: st.DataObject, reach: bool) -> None:
        operation = data.draw(st.sampled_from(list(schema[path].values())))
        case = data.draw(operation.as_strategy())
        if reach and isinstance(case.body, dict):
            case.body["model" if "model" in case.body else "source"] = "stories"
            if "options" in case.body:
                case.body["options"] = {"num_predict": 4}
        case.validate_response(case.call(base_url=server.url), checks=[not_a_server_error])

    check()
