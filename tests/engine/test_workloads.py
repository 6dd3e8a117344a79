"""Any mixture of requests, budgets and pool sizes gives every request the answer it gets alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fake_model import FakeModel
from hypothesis import event, given, settings
from hypothesis import strategies as st

from puna.engine import Engine, Event, Request, SamplingParams, Speculation
from puna.engine.speculation import DRAFTERS

CONTEXT = 30
HABIT = 2.0  # enough for texts that repeat themselves at times


@dataclass(frozen=True)
class Job:
    request: Request
    arrival: int  # the step before which it is submitted
    cancel_after: int | None  # steps after its arrival


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    # Few distinct tokens and repeated stems, so that prefixes are shared, diverge, and are evicted.
    stem = draw(st.sampled_from([[], [1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9, 9, 9, 9, 9]]))
    prompt = [*stem, *draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))]
    shift = draw(st.sampled_from([False, False, True]))
    pooling = draw(st.sampled_from([None, None, None, None, "mean", "last"]))
    prompt_logprobs = None if pooling else draw(st.sampled_from([None, None, 0, 2]))
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1.0])),
        top_k=draw(st.sampled_from([0, 5])),
        repeat_penalty=draw(st.sampled_from([1.0, 1.3])),
        repeat_last_n=draw(st.sampled_from([-1, 0, 3, 64])),
        seed=draw(st.integers(0, 5)),
        max_tokens=draw(st.sampled_from([60, 60, 1, 5, 12] if shift else [None, None, 1, 5, 12])),
        min_tokens=draw(st.integers(0, 1)),
        allowed_token_ids=draw(st.sampled_from([None, None, None, [0, 1, 2, 3, 7]])),
        bad_words_ids=draw(st.sampled_from([[], [], [[1], [2, 3]]])),
        prompt_logprobs=prompt_logprobs,
    )
    request = Request(
        prompt,
        params,
        eos_ids=draw(st.sampled_from([[], [7], [7, 11]])),
        cache_salt=draw(st.sampled_from(["", "", "x"])),
        tenant=draw(st.sampled_from(["", "", "a", "b"])),
        shift=shift,
        num_keep=draw(st.sampled_from([0, 2, 9])),
        pooling=pooling,
    )
    return Job(request, draw(st.integers(0, 8)), draw(st.sampled_from([None, None, None, 0, 1, 2, 5, 10])))


def fake_model(habit: float) -> FakeModel:
    return FakeModel(vocab_size=12, context_length=CONTEXT, habit=habit)


def content(event: Event) -> tuple[Any, ...]:
    embedding = None if event.embedding is None else event.embedding.tobytes()
    return event.token, event.stop_id, event.finish_reason, event.prompt_logprobs, embedding


def alone(request: Request) -> list[tuple[Any, ...]]:
    engine = Engine(fake_model(HABIT), block_size=64, max_batch_tokens=4, max_sequences=1)
    return [content(event) for event in engine.submit(request)]


@settings(max_examples=120, deadline=None)
@given(
    workload=st.lists(jobs(), min_size=1, max_size=8),
    block_size=st.sampled_from([1, 2, 4, 5]),
    spare_blocks=st.integers(0, 4),
    max_sequences=st.integers(1, 6),
    spare_tokens=st.integers(0, 12),
    drafter=st.sampled_from([None, *DRAFTERS]),
    token_cost=st.sampled_from([0.0, 0.2, None]),
)
def test_every_answer_is_the_one_given_alone(
    workload: list[Job],
    block_size: int,
    spare_blocks: int,
    max_sequences: int,
    spare_tokens: int,
    drafter: str | None,
    token_cost: float | None,
) -> None:
    model = fake_model(HABIT)
    draft_model = fake_model(HABIT + 1) if drafter == "model" else None
    budget = max_sequences + spare_tokens
    engine = Engine(
        model,
        num_blocks=-(-CONTEXT // block_size) + spare_blocks,
        block_size=block_size,
        max_sequences=max_sequences,
        max_batch_tokens=budget,
        speculation=Speculation(drafter, 5, token_cost, draft_model) if drafter else None,
    )
    pool = engine.scheduler.pool
    streams = {}
    step = 0
    while len(streams) < len(workload) or engine.has_work:
        assert step < 5000, "the engine makes no progress"
        for i, job in enumerate(workload):
            if job.arrival == step:
                streams[i] = engine.submit(job.request)
            if job.cancel_after is not None and job.arrival + job.cancel_after == step:
                engine.cancel(streams[i].id)
        events = engine.step()
        assert drafter or len({e.request_id for e in events}) == len(events)
        if model.steps:
            assert sum(model.steps[-1]) <= budget
            assert len(model.steps[-1]) <= max_sequences
        for tenant in ("", "a", "b"):
            sequences = (*engine.scheduler.running, *engine.scheduler.waiting)
            # One that has shifted is admitted anew.
            arrived = [s.id for s in sequences if s.request.tenant == tenant and not s.timings.shifts]
            assert arrived == sorted(arrived), "first come, first served within a tenant"
        held = {b for s in engine.scheduler.running for b in s.blocks}
        assert pool.available == pool.num_blocks - len(held)
        for sequence in engine.scheduler.running:
            assert len(sequence.blocks) <= pool.blocks_for(len(sequence.tokens)), "a block is kept for a rejected draft"
        for block, (_, tokens) in pool._key_of.items():
            assert tuple(model.kv.tokens[block * block_size : (block + 1) * block_size]) == tokens
        step += 1
    engine.check_idle()

    event(f"shifted: {any(s.timings.shifts for s in streams.values())}")
    event(f"preempted: {engine.scheduler.num_preemptions > 0}")
    event(f"accepted a draft: {any(s.timings.accepted_tokens for s in streams.values())}")
    event(f"reused a prefix: {any(s.timings.cached_tokens for s in streams.values())}")
    for i, job in enumerate(workload):
        got = [content(event) for event in streams[i]]
        expected = alone(job.request)
        if got[-1][2] == "cancelled":
            assert job.cancel_after is not None
            assert got[:-1] == expected[: len(got) - 1]
        else:
            assert got == expected
