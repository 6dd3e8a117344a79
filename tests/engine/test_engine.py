"""The engine's steps on a fake model whose every token depends on the whole history (see fake_model)."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from fake_engine import PROMPT, assert_all_free, expected_greedy, greedy, make_engine, tokens_of
from fake_model import FakeModel

from puna.engine import Event, Request, Stream


def test_greedy_continuation() -> None:
    engine = make_engine()
    stream = engine.submit(Request(PROMPT, greedy(max_tokens=12)))
    events = list(stream)
    assert tokens_of(events) == expected_greedy(PROMPT, 12)
    assert [e.finish_reason for e in events] == [None] * 11 + ["length"]
    assert {e.request_id for e in events} == {stream.id}
    assert_all_free(engine)


@pytest.mark.parametrize("budget", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("block_size", [1, 3, 32])
def test_chunks_and_blocks_of_any_size_give_the_same(budget: int, block_size: int) -> None:
    engine = make_engine(max_batch_tokens=budget, max_sequences=1, block_size=block_size)
    events = list(engine.submit(Request(PROMPT, greedy(max_tokens=12))))
    assert tokens_of(events) == expected_greedy(PROMPT, 12)


def test_streams_can_be_read_in_any_order() -> None:
    engine = make_engine()
    streams = [engine.submit(Request([i, i + 1], greedy(max_tokens=5))) for i in range(3)]
    interleaved = [next(s).token for _ in range(5) for s in reversed(streams)]
    for place, i in enumerate((2, 1, 0)):
        assert interleaved[place::3] == expected_greedy([i, i + 1], 5)
    assert all(list(s) == [] for s in streams)


def test_take_gives_what_has_come() -> None:
    engine = make_engine()
    stream = engine.submit(Request([1], greedy(max_tokens=3)))
    assert stream.take() == []
    engine.step()
    engine.step()
    assert tokens_of(stream.take()) == expected_greedy([1], 2)
    assert tokens_of(list(stream)) == expected_greedy([1], 3)[2:]


def test_step_reports_the_events_of_all_requests() -> None:
    engine = make_engine()
    ids = [engine.submit(Request([i], greedy(max_tokens=1))).id for i in range(4)]
    assert [(e.request_id, e.finish_reason) for e in engine.step()] == [(i, "length") for i in ids]
    assert engine.step() == []


def test_a_long_prompt_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)  # nothing is learnt about the time that steps take
    model = FakeModel(context_length=200)
    engine = make_engine(model, max_batch_tokens=8, max_sequences=4, num_blocks=100)
    early = engine.submit(Request([1], greedy(max_tokens=30)))
    next(early)
    engine.submit(Request(list(range(40)), greedy(max_tokens=1)))
    late = engine.submit(Request([2], greedy(max_tokens=1)))
    model.steps.clear()
    for _ in range(5):
        before = early.timings.generated_tokens
        engine.step()
        assert early.timings.generated_tokens == before + 1
    assert model.steps == [[1, 7]] * 5  # the budget goes to the prompt, except one token for the one that decodes
    engine.step()
    assert model.steps[-1] == [1, 5, 1]
    assert late.timings.generated_tokens == 1


def test_what_a_prompt_leaves_of_the_budget_goes_to_the_next() -> None:
    model = FakeModel(context_length=200)
    engine = make_engine(model, max_batch_tokens=4, max_sequences=4, num_blocks=100)
    engine.submit(Request(list(range(5)), greedy(max_tokens=2)))
    engine.submit(Request([1], greedy(max_tokens=9)))
    for _ in range(4):
        engine.step()
    assert model.steps == [[4], [1, 1], [1, 1], [1]]


def test_max_sequences_is_respected_first_come_first_served() -> None:
    model = FakeModel()
    engine = make_engine(model, max_sequences=2)
    streams = [engine.submit(Request([i], greedy(max_tokens=3))) for i in range(5)]
    order = []
    while engine.has_work:
        order += [e.request_id for e in engine.step() if e.finish_reason]
        assert len(model.steps[-1]) <= 2
    assert order == [s.id for s in streams]


def test_preemption_changes_nothing_but_the_time() -> None:
    """Eight blocks for three sequences that grow to four, five and five: the later ones give way and come back."""
    engine = make_engine(num_blocks=8, context_length=20)
    prompts = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    streams = [
        engine.submit(Request(p, greedy(max_tokens=count))) for p, count in zip(prompts, (13, 17, 17), strict=True)
    ]
    order = []
    while engine.has_work:
        order += [e.request_id for e in engine.step() if e.finish_reason]
    assert engine.scheduler.num_preemptions > 0
    assert order == [s.id for s in streams]
    for prompt, stream, count in zip(prompts, streams, (13, 17, 17), strict=True):
        events = list(stream)
        assert tokens_of(events) == expected_greedy(prompt, count)
        assert stream.timings.generated_tokens == count
    assert_all_free(engine)


class TestCancel:
    def test_while_running_waiting_and_after_the_end(self) -> None:
        engine = make_engine(max_sequences=1)
        running = engine.submit(Request(PROMPT, greedy(max_tokens=12)))
        waiting = engine.submit(Request(PROMPT, greedy(max_tokens=12)))
        next(running)
        for stream in (waiting, running):
            event = engine.cancel(stream.id)
            assert event == Event(stream.id, finish_reason="cancelled")
            assert list(stream) == [event]
            assert engine.cancel(stream.id) is None
        assert engine.cancel(999) is None
        assert_all_free(engine)

    def test_in_the_middle_of_a_prompt(self) -> None:
        engine = make_engine(max_batch_tokens=4, max_sequences=4)
        stream = engine.submit(Request(PROMPT, greedy()))
        engine.step()
        engine.cancel(stream.id)
        assert_all_free(engine)

    def test_others_go_on(self) -> None:
        engine = make_engine()
        streams = [engine.submit(Request([i], greedy(max_tokens=6))) for i in range(3)]
        engine.step()
        engine.cancel(streams[1].id)
        for i in (0, 2):
            assert tokens_of(list(streams[i])) == expected_greedy([i], 6)


def test_logits_that_are_not_numbers_end_only_that_request() -> None:
    class Broken(FakeModel):
        def forward(self, batch: Any, kv: Any) -> Any:
            logits = super().forward(batch, kv)
            logits[batch.tokens[batch.logit_rows] == 13] = np.nan
            return logits

    engine = make_engine(Broken())
    bad, good = (engine.submit(Request(p, greedy(max_tokens=1))) for p in ([13], PROMPT))
    (event,) = bad
    assert event.finish_reason == "error"
    assert "no token may be chosen" in str(event.error)
    assert tokens_of(list(good)) == expected_greedy(PROMPT, 1)


def test_memory_budget() -> None:
    engine = make_engine(num_blocks=None, kv_memory_bytes=16 * 4 * 5 + 63)
    assert engine.scheduler.pool.num_blocks == 5
    assert make_engine(num_blocks=None).scheduler.pool.num_blocks == 16  # one context of 64


def test_an_exception_of_the_model_loses_nothing() -> None:
    """A step that fails (interrupted, out of memory) can be tried again."""

    class Interrupted(FakeModel):
        calls = 0

        def forward(self, batch: Any, kv: Any) -> Any:
            self.calls += 1
            if self.calls in (1, 3, 4, 6):
                kv.tokens[batch.slots] = 49  # the cache may be half written
                raise KeyboardInterrupt
            return super().forward(batch, kv)

    engine = make_engine(Interrupted(), max_batch_tokens=4, max_sequences=2)
    streams = [engine.submit(Request(p, greedy(max_tokens=6))) for p in (PROMPT, [1])]
    while engine.has_work:
        try:
            engine.step()
        except KeyboardInterrupt:
            continue
    assert [tokens_of(list(s)) for s in streams] == [expected_greedy(PROMPT, 6), expected_greedy([1], 6)]
    assert_all_free(engine)


def test_timings() -> None:
    engine = make_engine(max_sequences=1)
    streams: list[Stream] = [engine.submit(Request(PROMPT, greedy(max_tokens=3))) for _ in range(2)]
    list(streams[1])
    first, second = (s.timings for s in streams)
    assert (first.prompt_tokens, first.cached_tokens, first.generated_tokens) == (9, 0, 3)
    assert (second.prompt_tokens, second.cached_tokens, second.generated_tokens) == (9, 8, 3)
    for timings in (first, second):
        assert min(timings.queue_seconds, timings.prefill_seconds, timings.decode_seconds) > 0
    assert second.queue_seconds > first.prefill_seconds + first.decode_seconds  # it waited for the other one's place
