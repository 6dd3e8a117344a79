"""What an answer is: where it ends, which tokens it may have, and that a seed repeats it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_engine import PROMPT, OneToken, assert_all_free, expected_greedy, greedy, make_engine, tokens_of
from fake_model import FakeModel, fake_logits

from puna.engine import Request, SamplingParams, Speculation
from puna.errors import RequestError


class TestEnds:
    def test_an_eos_ends_the_answer_and_is_not_part_of_it(self) -> None:
        engine = make_engine()
        full = expected_greedy(PROMPT, 12)
        end = full.index(full[5])
        stream = engine.submit(Request(PROMPT, greedy(logprobs=True), eos_ids=[full[5]]))
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
