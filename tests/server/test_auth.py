"""Who is let in: keys, scopes, origins and hosts, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from guarded_server import GuardedServer

from puna.errors import StoreError
from puna.server.app import create_app
from puna.server.keys import KeyFile
from puna.server.policy import GENERATE, OPEN, READ, policy_of
from puna.server.settings import ServerSettings
from puna.store import Store


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, str]]:
    """A server with one key of the scope inference in its file, and the admin's key ``root`` given at the start."""
    store = Store(tmp_path_factory.mktemp("keyed"), notify=lambda _: None)
    secret = KeyFile(store).add("alice")
    with GuardedServer(store, api_keys=("root",)) as server, httpx.Client(base_url=server.url) as client:
        yield client, secret


def test_keys_open_what_their_scope_allows(keyed: tuple[httpx.Client, str]) -> None:
    client, alice = keyed
    bearer = {"Authorization": f"Bearer {alice}"}
    assert client.post("/api/show", json="x", headers=bearer).json() == {"tenant": "alice", "length": 1}
    assert client.post("/api/pull", headers={"authorization": "bearer root"}).status_code == 200
    both = {"x-api-key": "another service's", "Authorization": "Bearer root"}
    assert client.post("/api/pull", headers=both).status_code == 200
    refused = client.post("/api/pull", headers=bearer)
    assert refused.status_code == 403
    assert refused.json() == {"error": "the key alice may use models, but this needs a key of the scope admin"}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic root"},
        {"Authorization": "root"},
        {"x-api-key": ""},
        {"x-api-key": "wrong", "Authorization": "Bearer wrong too"},
    ],
)
@pytest.mark.parametrize("path", ["/api/show", "/api/pull", "/api/generate", "/metrics", "/v1/messages", "/nothing"])
def test_without_the_right_key_nothing_is_done(
    keyed: tuple[httpx.Client, str], headers: dict[str, str], path: str
) -> None:
    response = keyed[0].post(path, json={}, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "stories" not in response.text


def test_errors_have_the_shape_of_their_api(keyed: tuple[httpx.Client, str]) -> None:
    client = keyed[0]
    anthropic = client.post("/v1/messages", json={}).json()
    assert (anthropic["type"], anthropic["error"]["type"]) == ("error", "authentication_error")
    openai = client.post("/v1/chat/completions", json={}).json()
    assert openai["error"]["type"] == "authentication_error"
    assert isinstance(client.post("/api/chat", json={}).json()["error"], str)


def test_probes_need_no_key(keyed: tuple[httpx.Client, str]) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert keyed[0].get(path).json() == {"status": "ok"}


def test_every_route_has_the_policy_that_was_meant() -> None:
    assert {policy_of("POST", path) for path in GENERATE} == {"generate"}
    assert {policy_of("GET", path) for path in OPEN} == {"open"}
    assert {policy_of("POST", path) for path in READ} == {"read"}
    for method, path in (
        ("POST", "/api/create"),
        ("POST", "/api/copy"),
        ("POST", "/api/pull"),
        ("POST", "/api/pull/"),
        ("POST", "/api/push"),
        ("DELETE", "/api/delete"),
        ("POST", "/api/blobs/sha256:0/render"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("POST", "/v1/filesystem"),
        ("DELETE", "/v1/models/x"),
        ("DELETE", "/api/generate"),
    ):
        assert policy_of(method, path) == "admin", path
    for method, path in (
        ("GET", "/metrics"),
        ("GET", "/api/tags"),
        ("GET", "/v1/models"),
        ("POST", "/v1/files"),
        ("DELETE", "/v1/files/f"),
        ("POST", "/v1/batches/b/cancel"),
        ("DELETE", "/v1/responses/r"),
        ("POST", "/v1/chat/completions/render"),
    ):
        assert policy_of(method, path) == "read", path


def test_a_key_file_in_ruins_stops_the_start(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = KeyFile(store).path
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        create_app(ServerSettings(), store)


@pytest.fixture(scope="module")
def keyless(model_store: Store) -> Iterator[httpx.Client]:
    settings = {"origins": ("https://app.example", "chrome-extension://*")}
    with GuardedServer(model_store, **settings) as server, httpx.Client(base_url=server.url) as client:
        yield client


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "http://localhost:3000",
        "https://127.0.0.1:8443",
        "http://[::1]:5000",
        "vscode-webview://abc",
        "https://app.example",
        "HTTPS://APP.example",
        "chrome-extension://abcdef",
    ],
)
def test_pages_of_allowed_origins_may_call(keyless: httpx.Client, origin: str) -> None:
    response = keyless.post("/api/show", json="x", headers={"Origin": origin})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == origin
    assert response.headers["vary"] == "Origin"
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a, x-b"}
    preflight = keyless.options("/api/generate", headers=asked)
    assert preflight.status_code == 204
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["access-control-allow-headers"] == "x-a, x-b"
    assert preflight.headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "https://app.example.evil.example",
        "https://app.example:444",
        "http://localhost.evil.example",
        "http://localhost@evil.example",
        "http://localhost:1/evil.example",
        "null",
        "",
    ],
)
def test_other_pages_reach_nothing(keyless: httpx.Client, origin: str) -> None:
    for method, path in (("POST", "/api/generate"), ("GET", "/livez"), ("OPTIONS", "/api/generate")):
        response = keyless.request(method, path, headers={"Origin": origin, "Access-Control-Request-Method": "POST"})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:11434", "localhost.evil.example", "127.0.0.1.evil.example"]
)
def test_a_rebound_name_reaches_nothing(keyless: httpx.Client, host: str) -> None:
    """DNS rebinding: the page's own origin and host agree, and neither is this machine's."""
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
        response = keyless.post("/api/show", json="x", headers=headers)
        assert response.status_code == 403, headers
        assert "--origins" in response.json()["error"]


@pytest.mark.parametrize(
    "host", ["localhost:1", "127.0.0.1", "[::1]:11434", "LOCALHOST", "app.example", "box.local", "192.168.1.7"]
)
def test_names_of_this_machine_do(keyless: httpx.Client, host: str) -> None:
    assert keyless.post("/api/show", json="x", headers={"Host": host}).status_code == 200


def test_a_key_protects_where_names_cannot(keyed: tuple[httpx.Client, str]) -> None:
    headers = {"Host": "llm.example", "Origin": "https://llm.example", "x-api-key": "root"}
    assert keyed[0].post("/api/show", json="x", headers=headers).status_code == 200
    assert keyed[0].post("/api/show", json="x", headers={**headers, "Origin": "https://a.example"}).status_code == 403
