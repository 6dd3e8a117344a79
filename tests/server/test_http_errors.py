"""Bodies that are no JSON, in the sentence and the shape of each API."""

from __future__ import annotations

import httpx
import pytest

JSON = {"Content-Type": "application/json"}
ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/messages", "/tokenize"]


def message_of(route: str, response: httpx.Response) -> str:
    error = response.json()["error"]
    assert response.json().get("type") == ("error" if route == "/v1/messages" else None)
    message: str = error if route.startswith("/api/") else error["message"]
    return message


@pytest.mark.parametrize("route", [*ROUTES, "/api/chat", "/api/show"])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model":"\xff"}', "the body is not UTF-8: invalid start byte at byte 10"),
        (b"[" * 100_000, "the body is nested too deeply"),
        (b"", "the body is missing; send a JSON object"),
        (b'{"model"', "the body is not JSON: "),
    ],
    ids=["not UTF-8", "deep", "empty", "cut off"],
)
def test_no_json(http: httpx.Client, route: str, body: bytes, message: str) -> None:
    response = http.post(route, content=body, headers=JSON)
    assert response.status_code == 400
    assert message_of(route, response).startswith(message)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_the_header_that_says_json(http: httpx.Client, route: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = http.post(route, content=b'{"model": "stories"}', headers=headers)
    assert response.status_code == 400
    expected = f"the body must come with the header Content-Type: application/json, found {kind or 'none'}"
    assert message_of(route, response) == expected


def test_ollama_s_clients_need_not_say_json(http: httpx.Client) -> None:
    assert http.post("/api/show", content=b'{"model": "stories"}').status_code == 200
