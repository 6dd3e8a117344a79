"""Where every answer is counted, whatever API it is for: in the metrics, for its tenant's rate, and in the log."""

from __future__ import annotations

import time

from puna.engine import Timings
from puna.server.limits import Limits
from puna.server.logs import current_request
from puna.server.metrics import ServerMetrics


class Accounting:
    """What the answers of all models are counted in."""

    def __init__(self, metrics: ServerMetrics | None = None, limits: Limits | None = None) -> None:
        self.metrics = metrics or ServerMetrics()
        self.limits = limits or Limits()

    def begin(self, model: str, tenant: str, prompt_tokens: int) -> AnswerAccount:
        """An answer was submitted now."""
        return AnswerAccount(self, model, tenant, prompt_tokens)


class AnswerAccount:
    """One answer, from its submission to its end. Everything takes its labels once, so that a token costs little."""

    def __init__(self, accounting: Accounting, model: str, tenant: str, prompt_tokens: int) -> None:
        self._accounting = accounting
        self._model = model
        self._tenant = tenant
        self._prompt_tokens = prompt_tokens
        self._started = self._last = time.perf_counter()
        self._generated = 0
        self._inter_token = accounting.metrics.inter_token.labels(model)
        self._tokens = accounting.metrics.generated_tokens.labels(model)
        self._ended = False
        if (record := current_request.get()) is not None:
            record.model = model

    def generated(self, total: int) -> None:
        """So many tokens have come until now; those that came together share the time since the last ones."""
        fresh = total - self._generated
        if not fresh:
            return
        now = time.perf_counter()
        gaps = fresh
        if not self._generated:
            self._accounting.metrics.first_token.labels(self._model).observe(now - self._started)
            gaps -= 1
        for _ in range(gaps):
            self._inter_token.observe((now - self._last) / fresh)
        self._last = now
        self._generated = total
        self._tokens.inc(fresh)

    def end(self, reason: str, timings: Timings) -> None:
        """The answer is over, or nobody wants the rest of it. Only the first call counts."""
        if self._ended:
            return
        self._ended = True
        metrics, model = self._accounting.metrics, self._model
        metrics.finished.labels(model, reason).inc()
        metrics.end_to_end.labels(model).observe(time.perf_counter() - self._started)
        metrics.prompt_tokens.labels(model).inc(self._prompt_tokens)
        metrics.cache_queries.labels(model).inc(self._prompt_tokens)
        metrics.cache_hits.labels(model).inc(timings.cached_tokens)
        metrics.queue.labels(model).observe(timings.queue_seconds)
        if self._generated:
            metrics.prefill.labels(model).observe(timings.prefill_seconds)
            metrics.decode.labels(model).observe(timings.decode_seconds)
        self._accounting.limits.charge(self._tenant, self._prompt_tokens + self._generated)
        if (record := current_request.get()) is not None:
            record.add(timings, self._generated, reason)
