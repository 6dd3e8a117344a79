"""What a drafter proposes, and how much of it is worth trying."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
from fake_engine import greedy
from fake_model import FakeModel
from hypothesis import given
from hypothesis import strategies as st

from puna.engine import Engine, Request, Speculation
from puna.engine.draft_length import DraftCost, DraftLength
from puna.engine.ngram_drafter import SIZES, NgramIndex
from puna.engine.speculation import Lookahead


class TestNgrams:
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(1, 60), max_size=5))
    def test_the_index_finds_what_a_search_finds(self, tokens: list[int], looks: list[int]) -> None:
        index = NgramIndex()
        for length in sorted({min(look, len(tokens)) for look in looks} | {len(tokens)}):
            known = tokens[:length]
            expected = None
            for size in SIZES:
                places = [end for end in range(size, length) if known[end - size : end] == known[length - size :]]
                if length >= size and places:
                    expected = places[-1]
                    break
            assert index.find(array("i", known)) == expected

    def test_a_repetition_is_drafted_beyond_its_end(self) -> None:
        engine = Engine(FakeModel(), num_blocks=64, speculation=Speculation("ngram", 9, 0.0))
        stream = engine.submit(Request([8, 1, 2, 3, 1, 2, 3, 1, 2], greedy()))
        look = Lookahead(stream.sequence, stream.sequence.sampling_row(), 9)
        assert engine._speculator is not None
        engine._speculator._drafter.propose([look])
        assert look.draft == [3, 1, 2, 3, 1, 2, 3, 1, 2]


class TestDraftLength:
    @pytest.mark.parametrize("price", [0.02, 0.1, 0.3, 0.7])
    @pytest.mark.parametrize("accepted", [0, 1, 3, 5])
    def test_the_length_is_the_best_of_all(self, accepted: int, price: float) -> None:
        policy = DraftLength()
        for _ in range(20):
            policy.record(5, accepted)
        tested = min(accepted + 1, 5)
        share = (accepted * sum(0.85**i for i in range(20)) + 0.85**20) / (
            tested * sum(0.85**i for i in range(20)) + 2 * 0.85**20
        )
        speeds = [sum(share**i for i in range(k + 1)) / (1 + k * price) for k in range(13)]
        best = int(np.argmax(speeds))
        if speeds[best] >= 1.05:
            assert policy.choose(price, 12) == best
            assert policy.choose(price, best - 1) == best - 1 or best == 1
        else:
            assert policy.choose(price, 12) <= 1

    def test_what_fails_is_tried_less_and_less_often(self) -> None:
        policy = DraftLength()
        tried = []
        for step in range(1000):
            length = policy.choose(0.3, 8)
            if length:
                tried.append(step)
                policy.record(length, 0)
        assert len(tried) < 25
        assert tried[-1] - tried[-2] == 65
        policy.choose(0.3, 8)
        policy.record(1, 1)
        recovered = 0
        while policy.choose(0.3, 8) < 2:
            policy.record(1, 1)
            recovered += 1
        assert recovered < 6

    def test_nothing_is_drafted_where_there_is_no_room(self) -> None:
        assert DraftLength().choose(0.0, 0) == 0


class TestDraftCost:
    def test_a_fixed_cost_is_a_share_of_a_step_of_one(self) -> None:
        cost = DraftCost(0.1)
        cost.observe_step(1, 5.0)
        cost.observe_step(9, 5.0)
        assert cost.price(1) == pytest.approx(0.1)
        # 11 sequences: a step takes 2, a row 0.1 of it; an accepted token saves an eleventh of the step.
        assert cost.price(11) == pytest.approx(11 * 0.1 / 2)

    @pytest.mark.parametrize("row", [0.02, 0.3, 0.8])
    def test_it_is_learnt_from_steps(self, row: float) -> None:
        cost = DraftCost(None)
        for i in range(200):
            rows = 1 + (i * 7) % 9
            cost.observe_step(rows, 0.006 * (1 + row * (rows - 1)))
        assert cost.price(1) == pytest.approx(row, rel=1e-3)
        cost.observe_draft(2, 0.006)
        assert cost.price(1) == pytest.approx(row + 0.5 / 8, rel=1e-3)

    def test_steps_of_one_size_say_nothing(self) -> None:
        cost = DraftCost(None)
        before = cost.price(1)
        for _ in range(500):
            cost.observe_step(1, 0.01)
        assert cost.price(1) == pytest.approx(before)
