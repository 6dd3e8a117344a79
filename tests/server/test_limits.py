"""What is too much: long bodies, a full queue, rates, long answers."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from guarded_server import GuardedServer
from hypothesis import given
from hypothesis import strategies as st
from running_server import RunningServer

from puna.errors import RequestError
from puna.server import limits as limits_module
from puna.server.keys import KeyFile, Keys
from puna.server.limits import Bucket, Limits
from puna.store import Store, import_file

Limited = tuple[GuardedServer, dict[str, dict[str, str]]]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 600), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 5)), max_size=60))
def test_a_bucket_never_gives_more_than_its_rate(per_minute: int, arrivals: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    taken = 0
    for pause, count in arrivals:
        clock.now += pause
        if bucket.wait() == 0:
            bucket.take(count)
            taken += count
    # What a full bucket holds, what flowed in since, and what the last one may have overdrawn.
    assert taken <= per_minute + clock.now * per_minute / 60 + 5


def test_the_wait_is_exactly_until_there_is_one() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(100)
    assert bucket.wait() == pytest.approx(41)
    clock.now += 41.001
    assert bucket.wait() == 0


def test_rates_are_of_the_key_as_it_is_now(tmp_path: Path) -> None:
    file = KeyFile(Store(tmp_path))
    file.add("slow", requests_per_minute=2)
    file.add("brief", tokens_per_minute=100, max_tokens=5)
    clock = Clock()
    keys = Keys(["admin"], file)
    limits = Limits(keys, clock=clock)
    assert [limits.check_rates("slow") is None for _ in range(3)] == [True, True, False]
    assert limits.check_rates("slow") == ("the key slow has used its requests of this minute", pytest.approx(30))
    assert [limits.check_rates("api-key:1") for _ in range(1000)] == [None] * 1000
    limits.charge("brief", 250)
    assert limits.check_rates("brief") == ("the key brief has used its tokens of this minute", pytest.approx(90.6))
    clock.now += 91
    assert limits.check_rates("brief") is None
    assert limits.answer_tokens("brief", None) == limits.answer_tokens("brief", 5) == 5
    assert limits.answer_tokens("slow", None) is None
    with pytest.raises(RequestError, match="the key brief may have at most 5 tokens an answer, but 6 were asked for"):
        limits.answer_tokens("brief", 6)
    file.remove("slow")
    file.add("slow", requests_per_minute=1000)
    assert keys.required
    assert limits.check_rates("slow") is None


def stories(home: Path, shared_data: Path) -> Store:
    store = Store(home, notify=lambda _: None)
    import_file(shared_data / "weights" / "stories260K" / "stories260K.gguf", "stories", store=store)
    return store


@pytest.fixture(scope="module")
def busy(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    """Takes two requests at once, of which one is computed."""
    with GuardedServer(stories(tmp_path_factory.mktemp("busy"), shared_data), parallel=1, max_queue=1) as server:
        yield server


def is_emptied(server: GuardedServer) -> bool:
    """Whether no request is left, once those that end have ended."""
    limits = server.service.accounting.limits
    with httpx.Client(base_url=server.url, timeout=30) as client:
        return any(limits.in_server == 0 for _ in range(10_000) if client.get("/livez"))


def test_a_full_queue_says_so_at_once(busy: GuardedServer) -> None:
    with httpx.Client(base_url=busy.url, timeout=30) as client, ExitStack() as open_streams:
        for _ in range(2):
            stream = client.stream("POST", "/api/generate", json={"max_tokens": None})
            assert open_streams.enter_context(stream).status_code == 200
        refused = client.post("/api/generate", json={})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json() == {"error": "the server is busy with 2 requests; try again soon"}
        assert client.post("/v1/messages", json={}).json()["error"]["type"] == "overloaded_error"
        for path in ("/livez", "/readyz", "/metrics"):
            assert client.get(path).status_code == 200
        assert client.post("/api/show", json="x").status_code == 200
    with httpx.Client(base_url=busy.url, timeout=30) as client:
        assert is_emptied(busy)
        assert client.post("/api/generate", json={"max_tokens": 1}).status_code == 200


def test_requests_that_wait_for_a_model_count(busy: GuardedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arrive while the model loads; the third is refused, though nothing runs yet."""
    loading, loaded = threading.Event(), threading.Event()
    manager = busy.service.manager
    load = manager._load_llm

    def slow(*arguments: object) -> object:
        loading.set()
        assert loaded.wait(30)
        return load(*arguments)  # type: ignore[arg-type]

    loop = busy.service.engine_thread._loop
    asyncio.run_coroutine_threadsafe(manager.stop("stories"), loop).result(30)
    monkeypatch.setattr(manager, "_load_llm", slow)
    codes: list[int] = []

    def ask() -> None:
        codes.append(httpx.post(f"{busy.url}/api/generate", json={"max_tokens": 1}, timeout=30).status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert loading.wait(30)
    while 503 not in codes:
        assert any(thread.is_alive() for thread in threads)
    assert codes == [503]
    loaded.set()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200, 200, 503]


@pytest.fixture(scope="module")
def limited(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    """A server whose keys have a limit each, and the headers that send them."""
    store = stories(tmp_path_factory.mktemp("limited"), shared_data)
    file = KeyFile(store)
    headers = {
        "tokens": {"x-api-key": file.add("tokens", tokens_per_minute=20)},
        "requests": {"x-api-key": file.add("requests", requests_per_minute=1)},
        "short": {"x-api-key": file.add("short", max_tokens=3)},
    }
    with GuardedServer(store) as server:
        yield server, headers


def test_rates_over_http(limited: Limited) -> None:
    server, headers = limited
    with httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.post("/api/generate", json={}, headers=headers["requests"]).status_code == 200
        refused = client.post("/api/generate", json={}, headers=headers["requests"])
        assert refused.status_code == 429
        assert 55 <= int(refused.headers["retry-after"]) <= 60
        assert client.post("/api/show", json="", headers=headers["requests"]).status_code == 200
        assert client.post("/api/generate", json={"max_tokens": 40}, headers=headers["tokens"]).status_code == 200
        refused = client.post("/v1/chat/completions", json={}, headers=headers["tokens"])
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) > 60


def test_the_longest_answer_of_a_key(limited: Limited) -> None:
    server, headers = limited
    with httpx.Client(base_url=server.url, timeout=30) as client:
        answer = client.post("/api/generate", json={"max_tokens": None}, headers=headers["short"])
        assert json.loads(answer.text.splitlines()[-1])["end"] == "length"
        assert len(answer.text.splitlines()) <= 3
        refused = client.post("/api/generate", json={"max_tokens": 4}, headers=headers["short"])
        assert refused.status_code == 400
        assert "at most 3 tokens" in refused.json()["error"]


@pytest.fixture
def plain(busy: GuardedServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=busy.url, timeout=30) as client:
        yield client


def test_a_body_too_long_is_refused_by_its_header(busy: GuardedServer) -> None:
    for length in (b"33554433", b"9" * 30):
        with socket.create_connection(busy.server.servers[0].sockets[0].getsockname()) as client:
            client.sendall(b"POST /api/show HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + length + b"\r\n\r\n")
            answer = client.makefile("rb").readline()
        assert answer.startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 400 ")), length


def test_a_body_too_long_is_refused_while_it_comes(plain: httpx.Client) -> None:
    """In chunks, so that no header tells the length."""
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        yield b'"'
        for _ in range(33):
            sent += 1
            yield b"x" * (1 << 20)
        yield b'"'

    response = plain.post("/api/show", content=chunks(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert response.json() == {"error": "the body is longer than 33554432 bytes; send less"}
    assert plain.post("/api/show", json="x" * (1 << 20)).json()["length"] == 1 << 20


def test_a_body_that_stops_coming_gives_up_its_place(busy: GuardedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "BODY_SECONDS", 0.05)
    with socket.create_connection(busy.server.servers[0].sockets[0].getsockname()) as client:
        client.sendall(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"nothing of the body came for" in answer
    assert is_emptied(busy)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe",
        b'"\x00"',
        b"nul",
        b'"' + b"x" * 1000,
    ],
)
def test_malformed_bodies_are_the_clients_fault(plain: httpx.Client, body: bytes) -> None:
    for path in ("/api/show", "/api/generate"):
        response = plain.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text
        assert len(response.text) < 500


def test_headers_too_long_are_refused(plain: httpx.Client) -> None:
    with suppress(httpx.TransportError):  # the server may close while the client still writes
        assert plain.get("/livez", headers={"x-long": "y" * 200_000}).status_code in (400, 431)
    assert plain.get("/livez").status_code == 200


MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/generate", {"prompt": "Hello", "options": {"num_predict": 4}}),
        ("/api/chat", {"messages": MESSAGES, "options": {"num_predict": 4}}),
        ("/v1/completions", {"prompt": "Hello", "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4}),
    ],
)
def test_every_api_tells_whom_it_generates_for(
    path: str, body: dict[str, object], smollm2_path: Path, tmp_path: Path
) -> None:
    """Else the limits of a key would not reach its answers."""
    store = Store(tmp_path, notify=lambda _: None)
    import_file(smollm2_path, "smollm2", store=store)
    file = KeyFile(store)
    short, counted = file.add("short", max_tokens=3), file.add("counted", tokens_per_minute=5)
    with RunningServer(store) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        sent = {"model": "smollm2", "stream": False, **body}
        refused = client.post(path, json=sent, headers={"x-api-key": short})
        assert refused.status_code == 400
        assert "the key short may have at most 3 tokens" in refused.text
        assert client.post(path, json=sent, headers={"x-api-key": counted}).status_code == 200
        assert client.post(path, json=sent, headers={"x-api-key": counted}).status_code == 429


@pytest.mark.parametrize("path", ["/api/embed", "/v1/embeddings"])
def test_texts_that_become_vectors_count_too(path: str, shared_data: Path, tmp_path: Path) -> None:
    store = stories(tmp_path, shared_data)
    headers = {"x-api-key": KeyFile(store).add("counted", tokens_per_minute=5)}
    with RunningServer(store) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"model": "stories", "input": "Once upon a time there was a girl"}
        assert client.post(path, json=body, headers=headers).status_code == 200
        assert client.post(path, json=body, headers=headers).status_code == 429
