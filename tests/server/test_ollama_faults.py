"""Clients that leave, read slowly or send nonsense: nothing is lost, nothing is left behind, no 500."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import RunningServer
from schemathesis.checks import not_a_server_error

from puna.server.ollama.bodies import ChatBody, CopyBody, EmbedBody, GenerateBody, ShowBody
from puna.server.service import Service
from puna.store import Store, import_file

ENDLESS = {"model": "stories", "prompt": "Once", "options": {"temperature": 2, "top_k": 0, "top_p": 1}}
ROUTES = ("generate", "chat", "embed", "embeddings", "show", "copy", "pull", "push", "create")


@pytest.fixture
def own(shared_data: Path, tmp_path: Path) -> Iterator[RunningServer]:
    """A server of its own, over a store of its own."""
    store = Store(tmp_path / "home", notify=lambda _: None)
    import_file(shared_data / "weights" / "stories260K" / "stories260K.gguf", "stories", store=store)
    with RunningServer(store) as running:
        yield running


def service_of(server: RunningServer) -> Service:
    service: Service = server.app.state.service
    return service


def until(server: RunningServer, condition: Callable[[Service], bool]) -> None:
    """Ask the server again and again, each time through its engine's thread, until the condition holds."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for _ in range(20_000):
            if condition(service_of(server)):
                return
            assert http.get("/readyz").status_code == 200
    raise AssertionError("it never came to that")


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
        (model,) = service_of(own).manager.loaded()
        monkeypatch.setattr(model.llm.engine, "step", list)  # from now on, no answer would ever end by itself
    until(own, lambda service: service.engine_thread.num_running == 0)
    pool = model.llm.engine.scheduler.pool
    assert pool.available == pool.num_blocks
    assert model.leases == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_while_its_prompt_is_read_ends_that(
    own: RunningServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    httpx.post(own.url + "/api/generate", json={"model": "stories"}, timeout=60)
    (model,) = service_of(own).manager.loaded()
    monkeypatch.setattr(model.llm.engine, "step", list)
    client = send(own, "/api/generate", {**ENDLESS, "stream": stream})
    until(own, lambda service: service.engine_thread.num_running == 1)
    client.close()
    until(own, lambda service: service.engine_thread.num_running == 0 and model.leases == 0)


def test_a_client_that_leaves_while_the_model_loads_leaves_the_model(
    own: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = service_of(own).manager
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
    until(own, lambda service: bool(service.manager.loaded()))
    until(own, lambda service: service.engine_thread.num_running == 0 and not manager.loaded()[0].leases)


def test_a_slow_reader_holds_nobody_up(own: RunningServer) -> None:
    slow = send(own, "/api/generate", {**ENDLESS, "logprobs": True, "top_logprobs": 20}, receive_buffer=1024)
    body = {**ENDLESS, "stream": False, "options": {"num_predict": 8}}
    for _ in range(3):
        assert httpx.post(own.url + "/api/generate", json=body, timeout=60).status_code == 200
    slow.close()
    until(own, lambda service: service.engine_thread.num_running == 0 and not service.manager.loaded()[0].leases)


def test_a_model_that_is_unloaded_tells_those_who_wait(own: RunningServer) -> None:
    with httpx.stream("POST", own.url + "/api/generate", json=ENDLESS, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        (model,) = service_of(own).manager.loaded()
        engine_thread = service_of(own).engine_thread
        engine_thread.post(lambda: engine_thread.deliver(model.llm.engine, engine_thread._cancel_all(model.llm.engine)))
        assert "unloaded" in json.loads(list(lines)[-1])["error"]


def test_a_failure_in_the_middle_of_an_answer_is_its_last_line(
    own: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with httpx.stream("POST", own.url + "/api/generate", json=ENDLESS, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        (model,) = service_of(own).manager.loaded()
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


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def test_blobs(own: RunningServer) -> None:
    content = b"GGUF" + bytes(3_000_000)
    url = f"{own.url}/api/blobs/{digest_of(content)}"
    partial = service_of(own).store.blobs.partial
    assert httpx.head(url).status_code == 404
    wrong = httpx.post(url, content=content[:-1])
    assert wrong.status_code == 400
    assert "nothing was stored" in wrong.json()["error"]
    assert list(partial.glob("upload-*")) == []
    assert httpx.post(url, content=iter([content[:5], content[5:]])).status_code == 201  # chunked, of unknown length
    assert httpx.head(url).status_code == 200
    assert httpx.post(url, content=content).status_code == 200
    assert [path.read_bytes() for path in partial.glob("sha256-*")] == [content]
    for bad in ("sha256:xyz", "md5:" + "0" * 32, "..%2f..%2fetc"):
        assert httpx.post(f"{own.url}/api/blobs/{bad}", content=b"x").status_code in (400, 404)


def test_an_upload_that_breaks_off_leaves_nothing(own: RunningServer) -> None:
    address = httpx.URL(own.url)
    partial = service_of(own).store.blobs.partial
    with socket.create_connection((address.host, address.port)) as client:
        head = f"POST /api/blobs/{digest_of(b'x')} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n"
        client.sendall(head.encode() + bytes(2_000_000))
        until(own, lambda _: bool(list(partial.glob("upload-*"))))
    until(own, lambda _: not list(partial.glob("upload-*")))


class Mirror:
    """Serves one file with ranges. ``gate``: the first answer stops in the middle until it is set."""

    def __init__(self, content: bytes) -> None:
        self.ranges: list[str | None] = []
        self.gate = threading.Event()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked = self.headers["Range"]
                mirror.ranges.append(asked)
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                self.send_response(206 if asked else 200)
                if asked:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - start))
                self.send_header("ETag", '"one"')
                self.end_headers()
                middle = max(start, len(content) // 2)
                try:
                    self.wfile.write(content[start:middle])
                    mirror.gate.wait(60)
                    for at in range(middle, len(content), 1000):
                        self.wfile.write(content[at : at + 1000])
                except OSError:
                    pass

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/tales.gguf"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def mirror(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Mirror((shared_data / "weights" / "stories260K" / "stories260K.gguf").read_bytes())
    yield made
    made.close()


def test_pull(own: RunningServer, mirror: Mirror) -> None:
    mirror.gate.set()
    refused = httpx.post(own.url + "/api/pull", json={"model": mirror.url})
    assert (refused.status_code, "insecure" in refused.json()["error"]) == (400, True)
    body = {"model": mirror.url, "insecure": True}
    answer = httpx.post(own.url + "/api/pull", json=body, timeout=60)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["status"] for line in lines][-3:] == [
        "verifying sha256 digest",
        "writing manifest",
        "success",
    ]
    assert lines[0] == {"status": "pulling manifest"}
    size = (own.app.state.service.store.find("tales")).size
    progress = [line for line in lines if "completed" in line]
    assert progress[-1] == {"status": "pulling tales.gguf", "total": size, "completed": size}
    again = httpx.post(own.url + "/api/pull", json={**body, "stream": False}, timeout=60)
    assert again.json() == {"status": "success"}
    body = {"model": "tales", "prompt": "Once upon a time", "stream": False, "options": {"num_predict": 1}}
    assert httpx.post(own.url + "/api/generate", json=body, timeout=60).status_code == 200


def test_a_pull_that_is_left_goes_on_where_it_was(own: RunningServer, mirror: Mirror) -> None:
    body = {"model": mirror.url, "insecure": True}
    with httpx.stream("POST", own.url + "/api/pull", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if "completed" in json.loads(line):
                break
    mirror.gate.set()
    # The abandoned work ends at its next sign of progress, and only then lets go of the file.
    answer = httpx.post(own.url + "/api/pull", json={**body, "stream": False}, timeout=60)
    assert answer.json() == {"status": "success"}, answer.text
    assert mirror.ranges[0] is None
    assert mirror.ranges[1] is not None
    assert service_of(own).store.verify() == []


def test_two_pulls_of_one_model_share_the_work(own: RunningServer, mirror: Mirror) -> None:
    body = {"model": mirror.url, "insecure": True, "stream": False}
    answers: list[httpx.Response] = []

    def pull() -> None:
        answers.append(httpx.post(own.url + "/api/pull", json=body, timeout=60))

    threads = [threading.Thread(target=pull) for _ in range(2)]
    for thread in threads:
        thread.start()
    mirror.gate.set()
    for thread in threads:
        thread.join()
    assert [answer.json() for answer in answers] == [{"status": "success"}] * 2


def test_a_path_of_the_server_cannot_be_pulled(own: RunningServer, shared_data: Path) -> None:
    path = shared_data / "weights" / "stories260K" / "stories260K.gguf"
    for model in (str(path), f"file://{path}", "./stories260K.gguf", "tests/server"):
        answer = httpx.post(own.url + "/api/pull", json={"model": model, "stream": False}, timeout=60)
        assert answer.status_code in (400, 404, 502), (model, answer.text)
    assert [str(manifest.model_name) for manifest in service_of(own).store.models()] == ["stories:latest"]


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
