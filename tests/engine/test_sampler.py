from __future__ import annotations

import math
from array import array
from typing import Any

import numpy as np
import pytest

from puna.engine import Request, SamplingParams
from puna.engine.sampler import Sampler, uniform

TOKENS = array("i", [5, 6, 7, 8, 9])


def row(num_generated: int = 2, eos_ids: tuple[int, ...] = (), **params: Any) -> Any:
    return Sampler(Request([5, 6, 7], SamplingParams(**params), eos_ids), 50).row(TOKENS, num_generated, None)


def test_uniform_is_splitmix64() -> None:
    """The first outputs for state 0, as published for Java's SplittableRandom and the xoshiro generators."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [uniform(0, i) for i in range(4)] == [(x >> 11) / 2**53 for x in published]


def test_seed_0_is_no_special_case() -> None:
    """Its first number was exactly 0, so that every answer with this seed began with the most probable token."""
    assert row(0, seed=0).uniform > 0


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1, -1, 2**80])
def test_uniform_numbers_fill_the_interval_evenly(seed: int) -> None:
    numbers = np.array([row(i, seed=seed).uniform for i in range(4000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, 16, (0, 1))[0]
    assert ((counts - 250) ** 2 / 250).sum() < 45  # chi-square with 15 degrees of freedom: p about 1e-4
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06


def test_neighbouring_seeds_are_unrelated() -> None:
    first = np.array([[row(i, seed=seed).uniform for i in range(200)] for seed in (1, 2)])
    assert abs(np.corrcoef(first)[0, 1]) < 0.25


@pytest.mark.parametrize(
    ("window", "expected"), [(1, [9]), (3, [7, 8, 9]), (64, [5, 6, 7, 8, 9]), (-1, [5, 6, 7, 8, 9])]
)
@pytest.mark.parametrize("penalty", [{"repeat_penalty": 1.1}, {"presence_penalty": 1}, {"frequency_penalty": -1}])
def test_the_history_goes_back_into_the_prompt(window: int, expected: list[int], penalty: dict[str, float]) -> None:
    history = row(repeat_last_n=window, **penalty).history
    assert history.dtype == np.int32
    assert history.tolist() == expected


def test_without_penalties_there_is_no_history() -> None:
    assert row(repeat_last_n=-1).history is None
    assert row(repeat_last_n=0, repeat_penalty=1.1).history is None


def test_the_history_is_a_copy() -> None:
    """A view would forbid the sequence to grow."""
    tokens = array("i", [1, 2])
    kept = Sampler(Request([1], SamplingParams(repeat_penalty=2, repeat_last_n=-1)), 50).row(tokens, 1, None)
    tokens.append(3)
    assert kept.history.tolist() == [1, 2]


def test_bias_forbids_the_end_until_min_tokens() -> None:
    params = {"min_tokens": 2, "stop_token_ids": (4,), "logit_bias": {3: 1.5, 1: 9.0}}
    early = {3: 1.5, 1: -math.inf, 2: -math.inf, 4: -math.inf}
    assert row(0, (1, 2), **params).bias == early
    assert row(1, (1, 2), **params).bias == early
    assert row(2, (1, 2), **params).bias == {3: 1.5, 1: 9.0}


def test_bias_of_ignore_eos() -> None:
    assert row(5, (1, 2), ignore_eos=True, stop_token_ids=(4,)).bias == {1: -math.inf, 2: -math.inf}


def test_parameters_pass_through() -> None:
    values = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.6,
        "min_p": 0.1,
        "typical_p": 0.7,
        "repeat_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "top_logprobs": 5,
    }
    made = row(**values)
    assert {name: getattr(made, name) for name in values} == values
