"""What /metrics says after known requests, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from guarded_server import GuardedServer
from prometheus_client.parser import text_string_to_metric_families

from puna.store import Store

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "puna.json"
MODEL = {"model": "stories:latest"}


@pytest.fixture
def server(model_store: Store) -> Iterator[GuardedServer]:
    with GuardedServer(model_store) as running:
        yield running


def scrape(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_every_answer_is_counted_once(server: GuardedServer) -> None:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        prompt = "Once upon a time there was a little girl named Lily. She loved to play outside in the park all day."
        for _ in range(3):
            assert client.post("/api/generate", json={"prompt": prompt, "max_tokens": 9}).status_code == 200
        with client.stream("POST", "/api/generate", json={"prompt": prompt, "max_tokens": None}) as stream:
            next(stream.iter_lines())
        while client.post("/api/generate", json={"max_tokens": 0}).status_code != 400:
            pass
        found = scrape(client)
        # The client's leaving is seen by the server first, and by the engine at its next step.
        cancelled = "puna_requests_finished_total", (("finish_reason", "cancelled"), *MODEL.items())
        while found.get(cancelled) != 1 or found["puna_requests_running", tuple(MODEL.items())]:
            found = scrape(client)

    def value(name: str, **labels: str) -> float:
        return found[name, tuple(sorted((MODEL | labels).items()))]

    tokenizer_length = value("puna_prompt_tokens_total") / 4
    assert tokenizer_length > 32
    assert tokenizer_length == int(tokenizer_length)
    assert value("puna_requests_finished_total", finish_reason="length") == 3
    assert value("puna_prefix_cache_queries_total") == value("puna_prompt_tokens_total")
    # The second to the fourth request find the full blocks of 32 tokens that the first computed.
    assert value("puna_prefix_cache_hits_total") == 3 * ((tokenizer_length - 1) // 32 * 32)
    assert value("puna_generation_tokens_total") >= 3 * 9 + 1
    generated = value("puna_generation_tokens_total")
    assert value("puna_time_to_first_token_seconds_count") == 4
    assert value("puna_inter_token_latency_seconds_count") == generated - 4
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert value(f"puna_{name}_seconds_count") == 4
    assert value("puna_e2e_request_latency_seconds_sum") >= value("puna_request_prefill_time_seconds_sum")
    assert value("puna_requests_running") == value("puna_requests_waiting") == 0
    assert value("puna_kv_cache_usage_ratio") == 0
    assert value("puna_model_memory_bytes") > 1e5
    http = ("method", "POST"), ("route", "/api/generate")
    assert found["puna_http_requests_total", (*http, ("status", "200"))] == 4
    assert found["puna_http_requests_total", (*http, ("status", "400"))] == 1


def test_what_clients_invent_makes_no_new_labels(server: GuardedServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        for i in range(5):
            client.get(f"/nothing/{i}")
            client.request(f"BREW{i}", "/livez")
            client.get(f"/v1/models/none-{i}")
        http = [labels for name, labels in scrape(client) if name == "puna_http_requests_total"]
    assert {dict(labels)["route"] for labels in http} <= {"unmatched", "/livez", "/metrics", "/v1/models/{model:path}"}
    assert {dict(labels)["method"] for labels in http} <= {"GET", "other"}


def test_the_dashboard_asks_only_for_what_there_is(server: GuardedServer) -> None:
    text = DASHBOARD.read_text(encoding="utf-8")
    expressions = [
        target["expr"]
        for panel in json.loads(text)["panels"]
        for target in panel.get("targets", [])
        if "expr" in target
    ]
    asked = set(re.findall(r"\bpuna_\w+", " ".join(expressions)))
    assert len(asked) > 10
    with httpx.Client(base_url=server.url, timeout=30) as client:
        client.post("/api/generate", json={})
        there = {name for name, _ in scrape(client)}
    assert asked <= there, asked - there
