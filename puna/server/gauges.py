"""The state of the loaded models at the moment that Prometheus asks."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import FastAPI
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from puna.server.service import Service


class ModelGauges(Collector):
    """Lengths may be a step old: the engine's thread goes on meanwhile."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def describe(self) -> Iterable[Metric]:
        return _families()

    def collect(self) -> Iterable[Metric]:
        families = _families()
        running, waiting, usage, memory = families
        service: Service | None = getattr(self._app.state, "service", None)
        for model in service.manager.loaded() if service is not None else ():
            scheduler = model.llm.engine.scheduler
            pool = scheduler.pool
            running.add_metric([model.name], len(scheduler.running))
            waiting.add_metric([model.name], len(scheduler.waiting))
            usage.add_metric([model.name], 1 - pool.available / pool.num_blocks)
            memory.add_metric([model.name], model.num_bytes)
        return families


def _families() -> list[GaugeMetricFamily]:
    return [
        GaugeMetricFamily("puna_requests_running", "Requests that are computed now.", labels=["model"]),
        GaugeMetricFamily("puna_requests_waiting", "Requests that wait for a place.", labels=["model"]),
        GaugeMetricFamily("puna_kv_cache_usage_ratio", "Share of cache blocks in use, 0 to 1.", labels=["model"]),
        GaugeMetricFamily("puna_model_memory_bytes", "Memory that a loaded model may need.", labels=["model"]),
    ]
