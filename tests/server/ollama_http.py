"""Calls of ollama's routes by bare HTTP, and a question whose answer is known."""

from __future__ import annotations

import json
from typing import Any

import httpx

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
