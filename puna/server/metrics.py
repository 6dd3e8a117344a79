"""What Prometheus reads at /metrics. The names follow vLLM's, with the prefix ``puna_``."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
# Of one answer, each by model: field of ServerMetrics, name, help, buckets in seconds.
_HISTOGRAMS: list[tuple[str, str, str, Sequence[float]]] = [
    ("first_token", "puna_time_to_first_token_seconds", "From submission to the first token.", _REQUEST_SECONDS),
    ("inter_token", "puna_inter_token_latency_seconds", "Between one token and the next.", _TOKEN_SECONDS),
    ("end_to_end", "puna_e2e_request_latency_seconds", "From submission to the end.", _REQUEST_SECONDS),
    ("queue", "puna_request_queue_time_seconds", "Waiting for a place in the batch.", _REQUEST_SECONDS),
    ("prefill", "puna_request_prefill_time_seconds", "From there to the first token.", _REQUEST_SECONDS),
    ("decode", "puna_request_decode_time_seconds", "From the first token to the last.", _REQUEST_SECONDS),
]  # fmt: skip
_COUNTERS = [
    ("prompt_tokens", "puna_prompt_tokens", "Tokens of prompts, computed or found in the prefix cache.", ("model",)),
    ("generated_tokens", "puna_generation_tokens", "Tokens of answers.", ("model",)),
    ("cache_queries", "puna_prefix_cache_queries", "Tokens of prompts looked up in the prefix cache.", ("model",)),
    ("cache_hits", "puna_prefix_cache_hits", "Tokens of prompts that the prefix cache had.", ("model",)),
    ("finished", "puna_requests_finished", "Answers, by how they ended.", ("model", "finish_reason")),
    ("http", "puna_http_requests", "HTTP requests, by route.", ("method", "route", "status")),
]  # fmt: skip


class ServerMetrics:
    """Counters and histograms of one server, in a registry of its own."""

    first_token: Histogram
    inter_token: Histogram
    end_to_end: Histogram
    queue: Histogram
    prefill: Histogram
    decode: Histogram
    prompt_tokens: Counter
    generated_tokens: Counter
    cache_queries: Counter
    cache_hits: Counter
    finished: Counter
    http: Counter

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for field, name, text, buckets in _HISTOGRAMS:
            setattr(self, field, Histogram(name, text, ("model",), buckets=buckets, registry=self.registry))
        for field, name, text, labels in _COUNTERS:
            setattr(self, field, Counter(name, text, labels, registry=self.registry))

    def text(self) -> bytes:
        """What Prometheus scrapes, in its text format."""
        return generate_latest(self.registry)
