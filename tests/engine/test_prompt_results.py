"""What is computed of a prompt beside its answer: log probabilities and pooled hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_engine import PROMPT, expected_greedy, greedy, make_engine, tokens_of
from fake_model import FakeModel, fake_logits

from puna.engine import Request


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
