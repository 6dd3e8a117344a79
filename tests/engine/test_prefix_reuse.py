"""What the cache holds of a prompt is not computed again, and changes no answer."""

from __future__ import annotations

import pytest
from fake_engine import PROMPT, assert_all_free, expected_greedy, greedy, make_engine, tokens_of
from fake_model import FakeModel

from puna.engine import Request, SamplingParams


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
