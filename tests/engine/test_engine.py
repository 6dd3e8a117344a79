"""The engine on a fake model whose every token depends on the whole history (see fake_model)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_model import FakeModel, fake_logits

from puna.engine import Engine, Event, Request, SamplingParams, Speculation, Stream
from puna.errors import RequestError


def greedy(**overrides: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, **overrides})


def make_engine(model: FakeModel | None = None, **overrides: Any) -> Engine:
    return Engine(model or FakeModel(), **{"num_blocks": 64, "block_size": 4, **overrides})


def expected_greedy(prompt: Sequence[int], count: int, vocab_size: int = 50, banned: Sequence[int] = ()) -> list[int]:
    """The most probable continuation, computed without any engine."""
    history = list(prompt)
    for _ in range(count):
        logits = fake_logits(np.array(history), vocab_size)
        logits[list(banned)] = -np.inf
        history.append(int(logits.argmax()))
    return history[len(prompt) :]


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def assert_all_free(engine: Engine) -> None:
    assert not engine.has_work
    engine.check_idle()


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


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


class TestPrefixReuse:
    def test_a_repeated_prompt_is_computed_only_at_its_end(self) -> None:
        model = FakeModel()
        engine = make_engine(model)
        first = engine.submit(Request(PROMPT, greedy(max_tokens=4)))
        answer = tokens_of(list(first))
        model.steps.clear()
        second = engine.submit(Request(PROMPT, greedy(max_tokens=4)))
        assert tokens_of(list(second)) == answer == expected_greedy(PROMPT, 4)
        assert (first.timings.cached_tokens, second.timings.cached_tokens) == (0, 8)
        assert model.steps[0] == [1]

    def test_the_last_prompt_token_is_always_computed(self) -> None:
        model = FakeModel()
        engine = make_engine(model)
        prompt = PROMPT[:8]  # exactly two blocks
        for cached in (0, 4, 4):
            stream = engine.submit(Request(prompt, greedy(max_tokens=4)))
            assert tokens_of(list(stream)) == expected_greedy(prompt, 4)
            assert stream.timings.cached_tokens == cached

    def test_an_answer_is_part_of_the_next_turn(self) -> None:
        engine = make_engine()
        answer = tokens_of(list(engine.submit(Request(PROMPT, greedy(max_tokens=10)))))
        turn = [*PROMPT, *answer, 7, 7]
        stream = engine.submit(Request(turn, greedy(max_tokens=3)))
        assert tokens_of(list(stream)) == expected_greedy(turn, 3)
        assert stream.timings.cached_tokens == 16  # of 18 computed tokens, the full blocks

    def test_running_sequences_share_blocks(self) -> None:
        engine = make_engine(block_size=2)
        prompt = [*PROMPT, *PROMPT]
        streams = [engine.submit(Request([*prompt, 1], greedy(max_tokens=8)))]
        engine.step()
        streams += [engine.submit(Request([*prompt, i], greedy(max_tokens=8))) for i in range(2, 5)]
        engine.step()
        pool = engine.scheduler.pool
        assert pool.num_blocks - pool.available == 9 + 4  # nine of the common prompt, one each for the rest
        for i, stream in enumerate(streams, 1):
            assert tokens_of(list(stream)) == expected_greedy([*prompt, i], 8)
        assert_all_free(engine)

    @pytest.mark.parametrize("budget", [7, 64])
    def test_copies_of_a_prompt_are_computed_once(self, budget: int) -> None:
        model = FakeModel()
        engine = make_engine(model, max_batch_tokens=budget, max_sequences=7)
        params = [SamplingParams(seed=seed, temperature=1.5, max_tokens=5) for seed in range(5)]
        streams = [engine.submit(Request(PROMPT, p)) for p in params]
        answers = [tokens_of(list(stream)) for stream in streams]
        assert answers == [tokens_of(list(make_engine().submit(Request(PROMPT, p)))) for p in params]
        assert len({tuple(answer) for answer in answers}) > 1
        assert [stream.timings.cached_tokens for stream in streams] == [0, 8, 8, 8, 8]
        assert sum(map(sum, model.steps)) == 9 + 4 * 1 + 5 * 4  # the prompt, four last tokens, five answers
        assert_all_free(engine)

    def test_nobody_waits_for_a_prefix_that_a_cancelled_request_would_have_computed(self) -> None:
        engine = make_engine(max_batch_tokens=2, max_sequences=2)
        first, second = (engine.submit(Request(PROMPT, greedy(max_tokens=3))) for _ in range(2))
        engine.step()
        engine.cancel(first.id)
        assert tokens_of(list(second)) == expected_greedy(PROMPT, 3)

    def test_salts_keep_requests_apart(self) -> None:
        engine = make_engine()
        for salt, cached in (("a", 0), ("b", 0), ("a", 8)):
            stream = engine.submit(Request(PROMPT, greedy(max_tokens=4), cache_salt=salt))
            assert tokens_of(list(stream)) == expected_greedy(PROMPT, 4)
            assert stream.timings.cached_tokens == cached

    def test_an_evicted_prefix_is_computed_again(self) -> None:
        engine = make_engine(num_blocks=4, context_length=16)
        for prompt in (PROMPT, list(range(20, 32)), PROMPT):
            stream = engine.submit(Request(prompt, greedy(max_tokens=4)))
            assert tokens_of(list(stream)) == expected_greedy(prompt, 4)
            assert stream.timings.cached_tokens == 0


class TestEnds:
    def test_an_eos_ends_the_answer_and_is_not_part_of_it(self) -> None:
        engine = make_engine()
        full = expected_greedy(PROMPT, 12)
        end = full.index(full[5])
        stream = engine.submit(Request(PROMPT, greedy(), eos_ids=[full[5]]))
        events = list(stream)
        assert tokens_of(events) == full[:end]
        assert (events[-1].token, events[-1].stop_id, events[-1].finish_reason) == (None, full[5], "stop")
        assert events[-1].logprob is not None
        assert stream.timings.generated_tokens == end + 1
        assert_all_free(engine)

    def test_stop_token_ids(self) -> None:
        full = expected_greedy(PROMPT, 12)
        events = list(make_engine().submit(Request(PROMPT, greedy(stop_token_ids=(full[3],)))))
        assert tokens_of(events) == full[: full.index(full[3])]
        assert events[-1].stop_id == full[3]

    def test_ignore_eos_forbids_it(self) -> None:
        eos = expected_greedy(PROMPT, 1)
        params = greedy(max_tokens=12, ignore_eos=True)
        events = list(make_engine().submit(Request(PROMPT, params, eos_ids=eos)))
        assert tokens_of(events) == expected_greedy(PROMPT, 12, banned=eos)
        assert events[-1].finish_reason == "length"

    def test_ignore_eos_leaves_stop_token_ids(self) -> None:
        stop = expected_greedy(PROMPT, 1)
        events = list(make_engine().submit(Request(PROMPT, greedy(stop_token_ids=stop, ignore_eos=True), eos_ids=[])))
        assert [e.stop_id for e in events] == stop

    def test_min_tokens_forbids_the_end_until_then(self) -> None:
        eos = expected_greedy(PROMPT, 1)
        stop = expected_greedy(PROMPT, 1, banned=eos)
        params = greedy(min_tokens=3, max_tokens=20, stop_token_ids=stop)
        events = list(make_engine().submit(Request(PROMPT, params, eos_ids=eos)))
        first = expected_greedy(PROMPT, 3, banned=[*eos, *stop])
        assert tokens_of(events)[:3] == first
        rest = expected_greedy([*PROMPT, *first], 17)
        ends = [i for i, token in enumerate(rest) if token in (*eos, *stop)]
        assert tokens_of(events)[3:] == rest[: ends[0] if ends else 17]

    def test_a_full_context_ends_the_answer(self) -> None:
        engine = make_engine(FakeModel(context_length=16))
        events = list(engine.submit(Request(PROMPT, greedy(max_tokens=100))))
        assert tokens_of(events) == expected_greedy(PROMPT, 16 - len(PROMPT))
        assert events[-1].finish_reason == "length"

    def test_the_pool_bounds_the_context(self) -> None:
        engine = make_engine(num_blocks=3)
        assert engine.context_length == 12
        events = list(engine.submit(Request(PROMPT, greedy())))
        assert tokens_of(events) == expected_greedy(PROMPT, 3)
        assert_all_free(engine)

    def test_logprobs_are_those_of_the_raw_logits(self) -> None:
        params = SamplingParams(seed=1, temperature=2.0, top_logprobs=3, logit_bias={7: 5.0}, max_tokens=5)
        history = list(PROMPT)
        for event in make_engine().submit(Request(PROMPT, params)):
            logits = fake_logits(np.array(history), 50).astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum())
            assert event.token is not None
            assert event.logprob == pytest.approx(logprobs[event.token])
            best = np.argsort(-logprobs)[:3]
            assert [i for i, _ in event.top] == best.tolist()
            assert [p for _, p in event.top] == pytest.approx(logprobs[best])
            history.append(event.token)


class TestPromptLogprobs:
    def expected(self, prompt: Sequence[int], count: int) -> list[tuple[float, list[tuple[int, float]]]]:
        """Log probability and most probable tokens of each place but the first, without any engine."""
        scores = []
        for place in range(1, len(prompt)):
            logits = fake_logits(np.array(prompt[:place]), 50).astype(np.float64)
            logprobs = logits - np.log(np.exp(logits).sum())
            best = np.argsort(-logprobs)[:count]
            scores.append((logprobs[prompt[place]], [(int(i), logprobs[i]) for i in best]))
        return scores

    @pytest.mark.parametrize("budget", [1, 5, 24, 64])
    @pytest.mark.parametrize(("count", "max_tokens"), [(0, 3), (3, 3), (2, 0)])
    def test_every_token_of_the_prompt_has_one(self, budget: int, count: int, max_tokens: int) -> None:
        engine = make_engine(max_batch_tokens=budget, max_sequences=1)
        list(engine.submit(Request(PROMPT, greedy(max_tokens=2))))  # leaves the prompt in the prefix cache
        stream = engine.submit(Request(PROMPT, greedy(prompt_logprobs=count, max_tokens=max_tokens)))
        first, *rest = list(stream)
        assert first.prompt_logprobs is not None
        assert [entry.token for entry in first.prompt_logprobs] == PROMPT
        assert first.prompt_logprobs[0] == (PROMPT[0], None, ())
        for entry, (logprob, top) in zip(first.prompt_logprobs[1:], self.expected(PROMPT, count), strict=True):
            assert entry.logprob == pytest.approx(logprob)
            assert [token for token, _ in entry.top] == [token for token, _ in top]
            assert [p for _, p in entry.top] == pytest.approx([p for _, p in top])
        assert all(event.prompt_logprobs is None for event in rest)
        assert tokens_of([first, *rest]) == expected_greedy(PROMPT, max_tokens)
        assert [event.finish_reason for event in (first, *rest)][-1] == "length"
        assert stream.timings.cached_tokens == 0
        engine.check_idle()

    def test_a_step_computes_few_rows_of_logits(self) -> None:
        model = FakeModel(context_length=400)
        engine = make_engine(model, num_blocks=100)
        list(engine.submit(Request([1] * 300, greedy(prompt_logprobs=0, max_tokens=0))))
        assert max(map(sum, model.steps)) == 64

    def test_a_prompt_that_fills_the_context(self) -> None:
        (event,) = make_engine().submit(Request([1] * 64, greedy(prompt_logprobs=0, max_tokens=0)))
        assert event.prompt_logprobs is not None
        assert len(event.prompt_logprobs) == 64


class TestPooling:
    @pytest.mark.parametrize("budget", [1, 4, 64])
    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_beside_generation(self, budget: int, pooling: Any) -> None:
        """The fake model's hidden states are its logits."""
        engine = make_engine(max_batch_tokens=budget, max_sequences=min(budget, 4))
        states = [fake_logits(np.array(PROMPT[: n + 1]), 50) for n in range(len(PROMPT))]
        expected = states[-1] if pooling == "last" else np.mean(states, axis=0, dtype=np.float64)
        for _ in range(2):  # the second time, a prefix is cached
            streams = [
                engine.submit(Request(PROMPT, greedy(max_tokens=8))),
                engine.submit(Request(PROMPT, pooling=pooling)),
            ]
            assert tokens_of(list(streams[0])) == expected_greedy(PROMPT, 8)
            (event,) = streams[1]
            assert (event.token, event.finish_reason) == (None, "stop")
            assert event.embedding is not None
            assert event.embedding.dtype == np.float32
            np.testing.assert_allclose(event.embedding, expected, rtol=1e-6)
            assert streams[1].timings.generated_tokens == 0
        engine.check_idle()

    def test_a_prompt_may_fill_the_context(self) -> None:
        (event,) = make_engine().submit(Request([1] * 64, pooling="last"))
        np.testing.assert_array_equal(event.embedding, fake_logits(np.ones(64), 50))


class TestShift:
    def expected(self, prompt: Sequence[int], count: int, context: int, keep: int) -> tuple[list[int], int]:
        history, answer, shifts = list(prompt), [], 0
        for _ in range(count):
            token = int(fake_logits(np.array(history), 50).argmax())
            history.append(token)
            answer.append(token)
            if len(history) == context and len(answer) < count:
                del history[keep : keep + (context - keep) // 2]
                shifts += 1
        return answer, shifts

    @pytest.mark.parametrize("keep", [0, 3, 9, 12])
    @pytest.mark.parametrize("drafter", [None, "ngram"])
    def test_the_older_half_is_forgotten(self, keep: int, drafter: str | None) -> None:
        speculation = Speculation(drafter, token_cost=0.0) if drafter else None
        engine = make_engine(FakeModel(context_length=16), max_batch_tokens=8, max_sequences=2, speculation=speculation)
        stream = engine.submit(Request(PROMPT, greedy(max_tokens=40), shift=True, num_keep=keep))
        other = engine.submit(Request([1], greedy(max_tokens=9)))
        events = list(stream)
        answer, shifts = self.expected(PROMPT, 40, 16, keep)
        assert tokens_of(events) == answer
        assert stream.timings.shifts == shifts > 0
        assert (stream.timings.generated_tokens, events[-1].finish_reason) == (40, "length")
        assert tokens_of(list(other)) == expected_greedy([1], 9)
        engine.check_idle()

    def test_it_is_off_where_nobody_asks(self) -> None:
        stream = make_engine(FakeModel(context_length=16)).submit(Request(PROMPT, greedy(max_tokens=40)))
        assert len(list(stream)) == 7
        assert stream.timings.shifts == 0


class TestForbiddenTokens:
    def test_allowed_token_ids(self) -> None:
        allowed = [3, 31, 32, 33, 49]
        stream = make_engine().submit(Request(PROMPT, greedy(max_tokens=10, allowed_token_ids=allowed)))
        banned = [token for token in range(50) if token not in allowed]
        assert tokens_of(list(stream)) == expected_greedy(PROMPT, 10, banned=banned)

    def test_allowed_token_ids_and_a_constraint(self) -> None:
        params = greedy(allowed_token_ids=[40, 33])
        stream = make_engine().submit(Request(PROMPT, params, constraint=OneToken([40, 2])))
        assert [event.finish_reason for event in stream] == [None, "error"]

    def test_bad_words(self) -> None:
        """What the model would write is forbidden, in whole and in the parts that remain possible."""
        plain = expected_greedy(PROMPT, 3)
        history, expected = list(PROMPT), []
        for place in range(3):
            logits = fake_logits(np.array(history), 50)
            if expected == plain[:2] and place == 2:
                logits[plain[2]] = -np.inf
            expected.append(int(logits.argmax()))
            history.append(expected[-1])
        assert expected[:2] == plain[:2]
        assert expected[2] != plain[2]
        stream = make_engine().submit(Request(PROMPT, greedy(max_tokens=3, bad_words_ids=[plain, [48, 1]])))
        assert tokens_of(list(stream)) == expected

    def test_a_single_token_is_a_bad_word_too(self) -> None:
        (bad,) = expected_greedy(PROMPT, 1)
        stream = make_engine().submit(Request(PROMPT, greedy(max_tokens=8, bad_words_ids=[[bad]])))
        assert tokens_of(list(stream)) == expected_greedy(PROMPT, 8, banned=[bad])

    def test_the_prompt_does_not_begin_a_bad_word(self) -> None:
        (token,) = expected_greedy(PROMPT, 1)
        params = greedy(max_tokens=1, bad_words_ids=[[PROMPT[-1], token]])
        assert tokens_of(list(make_engine().submit(Request(PROMPT, params)))) == [token]


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


class TestSeeds:
    def answer(self, params: SamplingParams, prompt: Sequence[int] = PROMPT, **engine_options: Any) -> list[int]:
        return tokens_of(list(make_engine(**engine_options).submit(Request(prompt, params))))

    def test_a_seed_decides_the_answer(self) -> None:
        one, again, other = (self.answer(SamplingParams(seed=s, max_tokens=20, temperature=1.5)) for s in (1, 1, 2))
        assert one == again
        assert one != other

    def test_whatever_else_runs(self) -> None:
        params = SamplingParams(seed=-5, max_tokens=20, temperature=1.5)
        engine = make_engine(max_batch_tokens=8, max_sequences=8)
        streams = [engine.submit(Request(PROMPT, params if i == 3 else SamplingParams())) for i in range(8)]
        assert tokens_of(list(streams[3])) == self.answer(params)

    def test_without_a_seed_the_one_drawn_is_recorded(self) -> None:
        request = Request(PROMPT, SamplingParams(max_tokens=20, temperature=1.5))
        answer = tokens_of(list(make_engine().submit(request)))
        assert answer == self.answer(SamplingParams(max_tokens=20, temperature=1.5, seed=request.seed))
        assert len({Request(PROMPT).seed for _ in range(20)}) > 15


class OneToken:
    """A constraint that allows one fixed token at a time, and fails where asked to."""

    def __init__(self, tokens: Sequence[int], fail_at: int = -1, reject_at: int = -1, broken: bool = False) -> None:
        self.tokens, self.fail_at, self.reject_at, self.broken = tokens, fail_at, reject_at, broken

    def start(self) -> OneTokenState:
        if self.broken:
            raise RequestError("cannot start")
        return OneTokenState(self)


class OneTokenState:
    def __init__(self, constraint: OneToken) -> None:
        self.constraint = constraint
        self.accepted: list[int] = []

    @property
    def complete(self) -> bool:
        return len(self.accepted) == len(self.constraint.tokens)

    def allowed(self) -> Any:
        if len(self.accepted) == self.constraint.fail_at:
            raise RequestError("no way on")
        mask = np.zeros(2, np.uint32)
        token = self.constraint.tokens[len(self.accepted)]
        mask[token // 32] |= np.uint32(1 << token % 32)
        return mask

    def accept(self, token: int) -> None:
        if len(self.accepted) == self.constraint.reject_at:
            raise RequestError("not that one")
        self.accepted.append(token)

    def fork(self) -> OneTokenState:
        state = OneTokenState(self.constraint)
        state.accepted = self.accepted[:]
        return state


class TestConstraints:
    def test_the_answer_follows_it_and_ends_with_it(self) -> None:
        engine = make_engine()
        constraint = OneToken([40, 2, 33, 7])
        streams = [engine.submit(Request(PROMPT, constraint=constraint)) for _ in range(2)]
        for stream in streams:
            events = list(stream)
            assert tokens_of(events) == [40, 2, 33, 7]
            assert (events[-1].token, events[-1].finish_reason, events[-1].stop_id) == (7, "stop", None)

    def test_it_survives_preemption(self) -> None:
        engine = make_engine(num_blocks=5, context_length=16)
        first = engine.submit(Request([1, 2], greedy(max_tokens=14)))
        tokens = list(range(10, 22))
        second = engine.submit(Request([3, 4], constraint=OneToken(tokens)))
        assert tokens_of(list(second)) == tokens
        assert engine.scheduler.num_preemptions > 0
        assert tokens_of(list(first)) == expected_greedy([1, 2], 14)

    @pytest.mark.parametrize(
        ("constraint", "params", "reason"),
        [
            (OneToken([1, 2, 3], fail_at=2), greedy(), "no way on"),
            (OneToken([1, 2, 3], reject_at=1), greedy(), "not that one"),
            (OneToken([1, 2, 3]), greedy(logit_bias={3: -np.inf}), "no token may be chosen"),
        ],
    )
    def test_a_failure_is_its_own_only(self, constraint: OneToken, params: SamplingParams, reason: str) -> None:
        engine = make_engine()
        good = [engine.submit(Request([1], greedy(max_tokens=6)))]
        bad = engine.submit(Request([2], params, constraint=constraint))
        good.append(engine.submit(Request([3], greedy(max_tokens=6))))
        last = list(bad)[-1]
        assert (last.finish_reason, last.token) == ("error", None)
        assert reason in str(last.error)
        assert [tokens_of(list(s)) for s in good] == [expected_greedy([1], 6), expected_greedy([3], 6)]
        assert_all_free(engine)

    def test_one_that_cannot_start_is_refused(self) -> None:
        engine = make_engine()
        with pytest.raises(RequestError, match="cannot start"):
            engine.submit(Request([1], constraint=OneToken([], broken=True)))
        assert_all_free(engine)


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


class TestRefusals:
    @pytest.mark.parametrize(
        ("prompt", "params", "reason"),
        [
            ([], {}, "prompt is empty"),
            (["a"], {}, "list of token ids"),
            ([1.5], {}, "list of token ids"),
            ([2**40], {}, "list of token ids"),
            ([1, 50], {}, "the prompt has token id 50, but the model's ids go from 0 to 49"),
            ([-1], {}, "token id -1"),
            ([1] * 64, {}, "the prompt has 64 tokens, but the context of 64"),
            ([1], {"logit_bias": {50: 1.0}}, "logit_bias has token id 50"),
            ([1], {"stop_token_ids": (50,)}, "stop_token_ids has token id 50"),
            ([1], {"top_logprobs": 51}, "top_logprobs must not exceed"),
            ([1], {"prompt_logprobs": 51}, "prompt_logprobs must not exceed"),
            ([1] * 65, {"prompt_logprobs": 0, "max_tokens": 0}, "context of 64 must hold it; shorten"),
            ([1], {"allowed_token_ids": [50]}, "allowed_token_ids has token id 50"),
            ([1], {"bad_words_ids": [[1, 50]]}, "bad_words_ids has token id 50"),
        ],
    )
    def test_requests(self, prompt: Any, params: dict[str, Any], reason: str) -> None:
        engine = make_engine()
        with pytest.raises(RequestError, match=reason):
            engine.submit(Request(prompt, SamplingParams(**params)))
        assert_all_free(engine)

    def test_num_keep_must_leave_room(self) -> None:
        engine = make_engine()
        with pytest.raises(RequestError, match="num_keep must leave two of the context's 64 tokens, found 63"):
            engine.submit(Request([1], shift=True, num_keep=63))
        assert_all_free(engine)

    def test_the_longest_prompt_is_accepted(self) -> None:
        events = list(make_engine().submit(Request([1] * 63, greedy())))
        assert tokens_of(events) == expected_greedy([1] * 63, 1)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"num_blocks": 0}, "num_blocks must be at least 1"),
            ({"block_size": 0}, "block_size"),
            ({"max_sequences": 65, "max_batch_tokens": 64}, "must not exceed max_batch_tokens"),
            ({"num_blocks": None, "kv_memory_bytes": 63}, "kv_memory_bytes must be at least 64, one block of 4 tokens"),
        ],
    )
    def test_engines(self, options: dict[str, Any], reason: str) -> None:
        with pytest.raises(RequestError, match=reason):
            make_engine(**options)


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
