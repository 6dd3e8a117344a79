"""Nobody waits longer than is fair: prompts beside streams, and tenants beside each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel

from puna.engine import Engine, Request, SamplingParams, Stream
from puna.engine.prefill_budget import FIRST_CHUNK, PrefillBudget

STEP = 0.010  # seconds of a step of one token
TOKEN = 0.001  # seconds of each further token


class TimedModel(FakeModel):
    """Each step takes a time that depends on its tokens alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, context_length: int = 10_000) -> None:
        super().__init__(context_length=context_length)
        self.now = 1.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def forward(self, batch: Any, kv: Any) -> Any:
        self.now += STEP + TOKEN * (len(batch.tokens) - 1)
        return super().forward(batch, kv)


def submit(engine: Engine, prompt: Sequence[int], max_tokens: int, tenant: str = "") -> Stream:
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    return engine.submit(Request(prompt, params, tenant=tenant))


class TestPrefillBesideDecoding:
    def test_a_long_prompt_beside_eight_streams(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Their gap stays under three times what it is without, and the prompt gets on."""
        model = TimedModel(monkeypatch)
        engine = Engine(model, num_blocks=400, block_size=32)
        streams = [submit(engine, [i], 2000) for i in range(8)]
        for _ in range(20):
            engine.step()
        alone = STEP + 7 * TOKEN
        prompt = submit(engine, [i % 50 for i in range(4000)], 2)
        gaps = []
        while not prompt.timings.generated_tokens:
            before = model.now
            engine.step()
            gaps.append(model.now - before)
            assert all(len(stream.take()) > 0 for stream in streams)
        assert np.percentile(gaps, 95) < 3 * alone
        assert len(gaps) < 4000 / 10
        assert gaps[-2] == pytest.approx(2.25 * alone, rel=0.1)

    def test_without_others_the_whole_budget_is_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = TimedModel(monkeypatch)
        engine = Engine(model, num_blocks=100, block_size=32)
        submit(engine, list(range(50)) * 30, 1)
        while engine.has_work:
            engine.step()
        assert model.steps == [[512], [512], [476]]


class TestPrefillBudget:
    def test_before_anything_is_known(self) -> None:
        assert PrefillBudget().tokens(4) == FIRST_CHUNK

    def test_little_more_than_the_time_of_decoding(self) -> None:
        budget = PrefillBudget()
        budget.observe(4, 0, 0.25)
        budget.observe(4, 64, 0.25 + 64 / 256)
        assert budget.tokens(4) == 80
        budget.observe(0, 512, 512 / 256)
        assert budget.tokens(4) == 80
        assert budget.tokens(1) == 80  # no other number of streams was measured

    def test_the_nearest_number_of_streams_counts(self) -> None:
        budget = PrefillBudget()
        budget.observe(0, 256, 1.0)
        budget.observe(1, 0, 0.125)
        budget.observe(32, 0, 1.0)
        assert [budget.tokens(n) for n in (1, 2, 3, 20, 40)] == [40, 40, 40, 320, 320]

    @pytest.mark.parametrize("seconds", [0.0, 1e-9, 0.1, 1e9])
    def test_absurd_times_are_survived(self, seconds: float) -> None:
        """A clock that stands, a machine that slept: there is always a chunk, and it comes right again."""
        budget = PrefillBudget()
        for _ in range(10):
            budget.observe(1, 0, seconds)
            budget.observe(1, 64, seconds)
        assert budget.tokens(1) >= 1
        for _ in range(15):
            budget.observe(1, 0, 0.25)
        for _ in range(15):
            budget.observe(1, 64, 0.5)
        assert budget.tokens(1) == 80
        for _ in range(5):  # a few do not matter
            budget.observe(1, 0, 100.0)
            budget.observe(1, 64, 100.0)
        assert budget.tokens(1) == 80


class TestTenants:
    def order(self, engine: Engine) -> list[int]:
        ended = []
        while engine.has_work:
            ended += [event.request_id for event in engine.step() if event.finish_reason]
        return ended

    def test_one_that_floods_does_not_hold_up_another(self) -> None:
        engine = Engine(FakeModel(), num_blocks=64, block_size=4, max_sequences=2)
        flood = [submit(engine, [i], 4, "a") for i in range(10)]
        for _ in range(8):
            engine.step()
        single = submit(engine, [20], 4, "b")
        order = self.order(engine)
        assert order.index(single.id) < 3
        assert [i for i in order if i != single.id] == [s.id for s in flood][-len(order) + 1 :]

    def test_work_counts_not_requests(self) -> None:
        """Five long prompts of one tenant against short ones of another: the tokens are the same on both sides."""
        engine = Engine(FakeModel(), num_blocks=64, block_size=4, max_sequences=1)
        long = [submit(engine, [i] * 29, 1, "a") for i in range(3)]
        short = [submit(engine, [10 + i] * 9, 1, "b") for i in range(9)]
        order = self.order(engine)
        turns = "".join("a" if request_id in {s.id for s in long} else "b" for request_id in order)
        assert turns == "abbbbabbbabb"
        assert [i for i in order if i in {s.id for s in short}] == [s.id for s in short]

    def test_a_short_prompt_does_not_wait_for_another_tenants_long_one(self) -> None:
        model = FakeModel(context_length=200)
        engine = Engine(model, num_blocks=100, block_size=4, max_batch_tokens=8, max_sequences=4)
        submit(engine, list(range(49)) * 3, 1, "a")
        engine.step()
        short = submit(engine, [1] * 5, 1, "b")
        engine.step()
        engine.step()
        assert model.steps == [[8], [8], [5, 3]]  # it starts level with the other, who comes first
        assert [event.finish_reason for event in short.take()] == ["length"]

    def test_a_pause_saves_nothing_up(self) -> None:
        engine = Engine(FakeModel(), num_blocks=64, block_size=4, max_sequences=1)
        submit(engine, [1], 5, "b")
        self.order(engine)
        first = [submit(engine, [i], 10, "a") for i in range(6)]
        for _ in range(25):
            engine.step()
        late = [submit(engine, [30 + i], 10, "b") for i in range(6)]
        order = self.order(engine)
        turns = "".join("b" if request_id in {s.id for s in late} else "a" for request_id in order)
        assert turns.startswith(("abab", "abba"))
        assert turns.endswith("bb")
        assert len(order) + 2 == len(first) + len(late)
