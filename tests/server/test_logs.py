"""The log: one line of JSON a request, with what an operator needs and nothing that a user wrote."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from guarded_server import GuardedServer

from puna.server.logs import JsonFormatter, configure_logs, logger
from puna.store import Store


class Lines(logging.Handler):
    """What was logged, as the JSON that it becomes."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))

    def of(self, path: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.texts) if line.get("path") == path]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, level = Lines(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.setLevel(level)
    logger.removeHandler(handler)


def test_a_request_is_one_line_without_its_prompt(model_store: Store, lines: Lines) -> None:
    with GuardedServer(model_store) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        body = {"prompt": "The secret of Lily", "max_tokens": 5}
        answer = client.post("/api/generate", json=body, headers={"X-Request-Id": "abc-1.2_3"})
        assert answer.headers["x-request-id"] == "abc-1.2_3"
        text = "".join(json.loads(line)["text"] for line in answer.text.splitlines())
        assert len(text) > 5
        client.get("/livez")
        client.get("/metrics")
    (line,) = lines.of("/api/generate")
    assert line["event"] == "request"
    assert line["level"] == "info"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    assert (line["request_id"], line["method"], line["status"]) == ("abc-1.2_3", "POST", 200)
    assert (line["model"], line["finish_reasons"]) == ("stories:latest", ["length"])
    assert line["tokens"]["generated"] == 5
    assert line["tokens"]["prompt"] > 3
    assert line["seconds"] >= line["prefill_seconds"] >= 0
    assert "tenant" not in line
    everything = "\n".join(lines.texts)
    assert "secret" not in everything
    assert text.strip() not in everything
    assert not lines.of("/livez")
    assert not lines.of("/metrics")


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é", '"}\\n{"'])
def test_ids_that_are_none_are_replaced(model_store: Store, lines: Lines, given: str) -> None:
    with GuardedServer(model_store) as server, httpx.Client(base_url=server.url) as client:
        answer = client.post("/v1/messages", json={}, headers={b"X-Request-Id": given.encode("utf-8")})
    found = answer.headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", found)
    assert answer.headers["request-id"] == found
    assert lines.of("/v1/messages")[0]["request_id"] == found


def test_log_requests_has_both_sides(model_store: Store, lines: Lines) -> None:
    with (
        GuardedServer(model_store, log_requests=True) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        answer = client.post("/api/generate", json={"prompt": "The secret of Lily"})
        client.post("/api/show", json="y" * 200_000)
    (line,) = lines.of("/api/generate")
    assert json.loads(line["body"]) == {"prompt": "The secret of Lily"}
    assert line["answer"] == answer.text
    assert len(lines.of("/api/show")[0]["body"]) == 1 << 16


def test_a_failure_is_told_to_the_log_only(model_store: Store, lines: Lines) -> None:
    with GuardedServer(model_store) as server, httpx.Client(base_url=server.url) as client:
        answer = client.post("/api/show", json="fail")
        assert answer.status_code == 500
        assert answer.json() == {
            "error": f"the server failed; its log tells why, request {answer.headers['x-request-id']}"
        }
    (line,) = lines.of("/api/show")
    assert line["level"] == "error"
    assert "ZeroDivisionError: secret detail" in line["failure"]


def test_everything_else_is_a_line_too() -> None:
    root = logging.getLogger()
    before = root.handlers, root.level, logger.level
    stream = io.StringIO()
    try:
        configure_logs(stream)
        logging.getLogger("asyncio").warning("Invalid HTTP request\nreceived")
        logger.info("serving", extra={"facts": {"url": "http://x"}})
        logging.getLogger("other").info("not shown")
    finally:
        root.handlers = before[0]
        root.setLevel(before[1])
        logger.setLevel(before[2])
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["event"], first["logger"], first["level"]) == (
        "Invalid HTTP request\nreceived",
        "asyncio",
        "warning",
    )
    assert (second["event"], second["url"]) == ("serving", "http://x")
