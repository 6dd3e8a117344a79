"""Drafts change how many tokens a step gives, never which: see also test_workloads and test_real_models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pytest
from fake_engine import PROMPT, OneToken, assert_all_free, greedy, tokens_of
from fake_model import FakeModel, fake_logits
from test_constraint import EOS, compiler

from puna.engine import Engine, Event, Request, SamplingParams, Speculation
from puna.engine.speculation import DRAFTERS, Limits, Lookahead
from puna.errors import RequestError


class Foretelling:
    """A drafter that proposes the tokens of a known answer, every ``wrong``-th of them changed."""

    answer: Sequence[int] = ()
    wrong = 10**9
    vocab_size = 50

    def __init__(self, options: Speculation, limits: Limits) -> None:
        pass

    def propose(self, lookaheads: Sequence[Lookahead]) -> None:
        for look in lookaheads:
            for place in range(look.sequence.num_generated, len(self.answer)):
                if not look.extend((self.answer[place] + (place % self.wrong == self.wrong - 1)) % self.vocab_size):
                    break

    def release(self, sequence_id: int) -> None:
        pass

    def check_idle(self) -> None:
        pass


@pytest.fixture
def foretold(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Speculation]:
    """Speculation on an answer that is known beforehand."""

    def make(answer: Sequence[int], wrong: int = 10**9, vocab_size: int = 50) -> Speculation:
        monkeypatch.setitem(DRAFTERS, "foretelling", "test_speculation:Foretelling")
        monkeypatch.setattr(Foretelling, "answer", answer)
        monkeypatch.setattr(Foretelling, "wrong", wrong)
        monkeypatch.setattr(Foretelling, "vocab_size", vocab_size)
        return Speculation("foretelling", max_tokens=4, token_cost=0.0)

    return make


def run(request: Request, speculation: Speculation | None = None, **options: Any) -> tuple[list[Event], Engine, Any]:
    engine = Engine(FakeModel(), **{"num_blocks": 64, "block_size": 4, "speculation": speculation, **options})
    stream = engine.submit(request)
    return [event._replace(request_id=0) for event in stream], engine, stream.timings


REQUESTS = {
    "greedy": Request(PROMPT, greedy(max_tokens=24)),
    "sampled": Request(PROMPT, SamplingParams(seed=3, max_tokens=24, top_logprobs=2)),
    "penalties": Request(
        PROMPT, greedy(max_tokens=24, repeat_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.0, repeat_last_n=6)
    ),
    "penalties on everything": Request(
        PROMPT, SamplingParams(seed=4, max_tokens=24, frequency_penalty=1.0, repeat_last_n=-1)
    ),
    "min_tokens": Request(PROMPT, SamplingParams(seed=5, max_tokens=30, min_tokens=9), eos_ids=range(25)),
    "ignore_eos": Request(PROMPT, SamplingParams(seed=5, max_tokens=30, ignore_eos=True), eos_ids=range(25)),
    "eos": Request(PROMPT, SamplingParams(seed=1, max_tokens=40), eos_ids=[13, 17, 30, 41]),
    "stop ids": Request(PROMPT, SamplingParams(seed=2, max_tokens=40, stop_token_ids=(13, 17, 30))),
    "one token": Request(PROMPT, greedy(max_tokens=1)),
    "two tokens": Request(PROMPT, greedy(max_tokens=2)),
    "full context": Request(PROMPT, greedy()),
    "constraint": Request(PROMPT, constraint=OneToken([40, 2, 33, 7, 1, 2, 3, 4, 5, 6, 7])),
    "constraint fails": Request(PROMPT, constraint=OneToken([40, 2, 33, 7, 1, 2], fail_at=4)),
    "constraint rejects": Request(PROMPT, constraint=OneToken([40, 2, 33, 7, 1, 2], reject_at=4)),
}


@pytest.mark.parametrize("wrong", [1, 2, 3, 5, 10**9])
@pytest.mark.parametrize("name", REQUESTS)
def test_the_events_are_those_of_plain_decoding(name: str, wrong: int, foretold: Callable[..., Speculation]) -> None:
    plain, _, timings = run(REQUESTS[name])
    answer = [e.token if e.token is not None else e.stop_id if e.stop_id is not None else 0 for e in plain]
    got, engine, drafting = run(REQUESTS[name], foretold([*answer, *range(10)], wrong))
    assert got == plain
    assert_all_free(engine)
    assert drafting.generated_tokens == timings.generated_tokens
    assert 0 <= drafting.accepted_tokens <= drafting.drafted_tokens
    if wrong == 1:
        assert drafting.accepted_tokens == 0
    if wrong > 100 and len(plain) > 8:
        assert len(engine.model.steps) < len(plain) / 2
        assert drafting.accepted_tokens == drafting.drafted_tokens > 0


def test_a_step_gives_all_tokens_that_the_draft_foretold(foretold: Callable[..., Speculation]) -> None:
    plain, _, _ = run(REQUESTS["greedy"])
    engine = Engine(FakeModel(), num_blocks=64, block_size=4, speculation=foretold(tokens_of(plain)))
    stream = engine.submit(REQUESTS["greedy"])
    sizes = []
    while engine.has_work:
        sizes.append(len(engine.step()))
    assert max(sizes) == 5  # four drafted tokens and the one after them
    assert tokens_of(list(stream)) == tokens_of(plain)


def test_drafts_take_only_what_the_step_has_left(foretold: Callable[..., Speculation]) -> None:
    plain, _, _ = run(REQUESTS["greedy"])
    model = FakeModel()
    engine = Engine(
        model, num_blocks=64, block_size=4, max_batch_tokens=3, max_sequences=2, speculation=foretold(tokens_of(plain))
    )
    streams = [engine.submit(REQUESTS["greedy"]) for _ in range(2)]
    for stream in streams:
        assert tokens_of(list(stream)) == tokens_of(plain)
    assert max(sum(step) for step in model.steps) == 3
    assert streams[0].timings.accepted_tokens > 0


def test_a_draft_makes_nobody_give_way(foretold: Callable[..., Speculation]) -> None:
    """Both sequences fit the pool exactly: drafts must do with the blocks that are left."""
    plain, _, _ = run(Request([7], greedy(max_tokens=15)))
    engine = Engine(FakeModel(), num_blocks=8, block_size=4, context_length=16, speculation=foretold(tokens_of(plain)))
    streams = [engine.submit(Request([7], greedy(max_tokens=15), cache_salt=salt)) for salt in "ab"]
    assert [tokens_of(list(s)) for s in streams] == [tokens_of(plain)] * 2
    assert engine.scheduler.num_preemptions == 0
    assert all(s.timings.accepted_tokens > 0 for s in streams)


def test_rejected_tokens_are_never_found_as_a_prefix(foretold: Callable[..., Speculation]) -> None:
    plain, _, _ = run(REQUESTS["greedy"])
    _, engine, timings = run(REQUESTS["greedy"], foretold(tokens_of(plain), wrong=3), block_size=2)
    assert timings.accepted_tokens < timings.drafted_tokens
    text = [*PROMPT, *tokens_of(plain)]
    pool = engine.scheduler.pool
    registered = {tokens for _, tokens in pool._key_of.values()}
    assert registered == {tuple(text[i : i + 2]) for i in range(0, len(text) - 2, 2)}


@pytest.mark.parametrize("failing", range(1, 9))
def test_an_exception_of_the_model_loses_nothing(failing: int, foretold: Callable[..., Speculation]) -> None:
    class Interrupted(FakeModel):
        calls = 0

        def forward(self, batch: Any, kv: Any) -> Any:
            self.calls += 1
            if self.calls == failing:
                kv.tokens[batch.slots] = 49
                raise KeyboardInterrupt
            return super().forward(batch, kv)

    plain, _, _ = run(REQUESTS["sampled"])
    answer = tokens_of(plain)
    for speculation in (
        foretold(answer, wrong=4),
        Speculation("model", 4, 0.0, draft_model=Interrupted()),
    ):
        model = Interrupted() if speculation.draft_model is None else FakeModel()
        engine = Engine(model, num_blocks=64, block_size=4, speculation=speculation)
        stream = engine.submit(REQUESTS["sampled"])
        while engine.has_work:
            try:
                engine.step()
            except KeyboardInterrupt:
                continue
        assert tokens_of(list(stream)) == answer
        assert_all_free(engine)


class TestGrammars:
    """llguidance: the mask at each place of a draft is the one of the tokens before it."""

    TEXT = b'{"a": 12, "b": 7}'
    SCHEMA = (
        '{"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, '
        '"required": ["a", "b"], "additionalProperties": false}'
    )

    @pytest.mark.parametrize("wrong", [1, 2, 3, 7, 10**9])
    @pytest.mark.parametrize("seed", range(4))
    def test_json(self, seed: int, wrong: int, foretold: Callable[..., Speculation]) -> None:
        params = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, seed=seed, max_tokens=80)
        constraint = compiler().json_schema(self.SCHEMA)
        request = Request([5], params, eos_ids=[EOS], constraint=constraint)

        def answer(speculation: Speculation | None) -> tuple[list[Event], Any]:
            model = FakeModel(vocab_size=257, context_length=128)
            engine = Engine(model, num_blocks=64, block_size=4, speculation=speculation)
            stream = engine.submit(request)
            return list(stream), stream.timings

        plain, _ = answer(None)
        got, timings = answer(foretold(tokens_of(plain), wrong, vocab_size=257))
        assert got == plain
        assert timings.accepted_tokens > 0 or wrong == 1

    def test_a_draft_ends_before_what_the_grammar_rejects(self) -> None:
        engine = Engine(FakeModel(vocab_size=257), num_blocks=8)
        stream = engine.submit(Request([1], greedy(), eos_ids=[EOS], constraint=compiler().regex("abc?")))
        look = Lookahead(stream.sequence, stream.sequence.sampling_row(), 9)
        assert look.extend(ord("a"))
        assert not look.extend(ord("x"))
        assert look.extend(ord("b"))
        assert not look.extend(EOS)  # would only end the answer
        assert not look.extend(ord("c"))  # completes it: the plain row of its place will do
        assert look.draft == list(b"ab")
        masks = [
            np.flatnonzero(np.unpackbits(r.allowed.view(np.uint8), bitorder="little"))
            for r in look.rows
            if r.allowed is not None
        ]
        assert [m.tolist() for m in masks] == [[ord("a")], [ord("b")], [ord("c"), EOS]]
        look.shorten(1)
        assert (look.draft, len(look.rows)) == ([ord("a")], 2)


class TestDistribution:
    """The joint frequencies of three tokens against their exact probabilities, by Pearson's chi-square test."""

    VOCAB, COUNT, HABIT = 4, 2000, 1.0
    TEMPERATURE = 0.9

    def exact(self, prompt: list[int]) -> dict[tuple[int, ...], float]:
        found = {}
        for answer in product(range(self.VOCAB), repeat=3):
            probability = 1.0
            for i, token in enumerate(answer):
                logits = fake_logits(np.array([*prompt, *answer[:i]]), self.VOCAB, self.HABIT).astype(np.float64)
                weights = np.exp((logits - logits.max()) / self.TEMPERATURE)
                probability *= weights[token] / weights.sum()
            found[answer] = probability
        return found

    @pytest.mark.parametrize("drafter", ["foretelling", "ngram", "model"])
    def test_it_is_kept(self, drafter: str, foretold: Callable[..., Speculation]) -> None:
        prompt = [1, 2, 3, 1, 2, 0, 1, 2, 3, 1, 2]
        speculation = {
            "foretelling": foretold([0, 1, 2], vocab_size=self.VOCAB),
            "ngram": Speculation("ngram", token_cost=0.0),
            "model": Speculation("model", token_cost=0.0, draft_model=FakeModel(self.VOCAB, habit=2.0)),
        }[drafter]
        engine = Engine(FakeModel(self.VOCAB, habit=self.HABIT), num_blocks=512, block_size=4, speculation=speculation)
        streams = []
        for seed in range(self.COUNT):
            params = SamplingParams(temperature=self.TEMPERATURE, top_k=0, top_p=1.0, max_tokens=3, seed=seed)
            streams.append(engine.submit(Request(prompt, params)))
            if len(streams) % 50 == 0:
                while engine.has_work:
                    engine.step()
        counts = Counter(tuple(tokens_of(list(stream))) for stream in streams)
        assert sum(s.timings.accepted_tokens for s in streams) > 100
        assert sum(s.timings.drafted_tokens - s.timings.accepted_tokens for s in streams) > 100
        exact = self.exact(prompt)
        assert sum(exact.values()) == pytest.approx(1)
        # Outcomes of fewer than five expected occurrences are counted as one, as the test's approximation needs.
        common = [answer for answer in exact if exact[answer] * self.COUNT >= 5]
        observed = [counts[answer] for answer in common]
        expected = [exact[answer] * self.COUNT for answer in common]
        observed.append(self.COUNT - sum(observed))
        expected.append(self.COUNT - sum(expected))
        statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True) if e > 0)
        freedom = len(common)
        # Wilson & Hilferty 1931: the 99.9th percentile of chi-square.
        limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
        assert freedom > 10
        assert statistic < limit


class TestDraftModel:
    def test_a_model_that_agrees_is_always_right(self) -> None:
        """Also where tokens are drawn at random: both models draw with the same numbers."""
        speculation = Speculation("model", 4, 0.0, draft_model=FakeModel())
        for name in ("greedy", "sampled", "penalties", "constraint"):
            plain, _, _ = run(REQUESTS[name])
            got, _, timings = run(REQUESTS[name], speculation)
            assert got == plain
            assert timings.accepted_tokens == timings.drafted_tokens > 0

    def test_all_sequences_draft_in_one_batch(self) -> None:
        draft_model = FakeModel(habit=1.0)
        engine = Engine(
            FakeModel(), num_blocks=64, block_size=4, speculation=Speculation("model", 3, 0.0, draft_model=draft_model)
        )
        for i in range(5):
            engine.submit(Request([i, 1, 2], greedy(max_tokens=20)))
        engine.step()
        engine.step()
        assert draft_model.steps == [[4] * 5, [1] * 5, [1] * 5]  # prompts and first tokens, then what they led to

    def test_a_second_turn_finds_its_prefix(self) -> None:
        draft_model = FakeModel()
        engine = Engine(
            FakeModel(), num_blocks=64, block_size=4, speculation=Speculation("model", 3, 0.0, draft_model=draft_model)
        )
        answer = tokens_of(list(engine.submit(Request(PROMPT, greedy(max_tokens=12)))))
        draft_model.steps.clear()
        list(engine.submit(Request([*PROMPT, *answer, 7], greedy(max_tokens=12))))
        assert draft_model.steps[0][0] < len([*PROMPT, *answer])
        drafter: Any = engine._speculator._drafter  # type: ignore[union-attr]
        assert drafter._pool.available == drafter._pool.num_blocks
        assert drafter._sequences == {}

    def test_it_drafts_no_further_than_its_own_context(self) -> None:
        short = FakeModel(context_length=16)
        plain, _, _ = run(REQUESTS["greedy"])
        got, _, timings = run(REQUESTS["greedy"], Speculation("model", 4, 0.0, draft_model=short))
        assert got == plain
        assert 0 < timings.accepted_tokens <= 16 - len(PROMPT)

    def test_a_long_prompt_is_caught_up_with_in_steps(self) -> None:
        prompt = [i % 50 for i in range(40)]
        draft_model = FakeModel()
        speculation = Speculation("model", 4, 0.0, draft_model=draft_model)
        plain, _, _ = run(Request(prompt, greedy(max_tokens=20)))
        got, _, timings = run(Request(prompt, greedy(max_tokens=20)), speculation, max_batch_tokens=16, max_sequences=1)
        assert got == plain
        assert [step[0] for step in draft_model.steps[:3]] == [16, 16, 11]
        assert timings.accepted_tokens > 0

    def test_another_vocabulary_is_refused(self) -> None:
        with pytest.raises(RequestError, match="same vocabulary; it has 12 tokens, the model 50"):
            run(REQUESTS["greedy"], Speculation("model", draft_model=FakeModel(vocab_size=12)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drafter": "oracle"}, "unknown drafter 'oracle'; known: ngram, model"),
        ({"max_tokens": 0}, "max_tokens of a draft must be at least 1"),
        ({"token_cost": 1.5}, "token_cost must be a share"),
        ({"token_cost": float("nan")}, "token_cost must be a share"),
        ({"drafter": "model"}, "needs a draft model"),
        ({"draft_model": FakeModel()}, "needs a draft model, and no other has one"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        Speculation(**options)
