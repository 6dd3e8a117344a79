"""The sampling specification against transformers' logits processors and against cases worked out by hand."""

import math

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from puna.ops.protocol import SamplingRow
from puna.ops.reference_sampling import adjust_logits, sample_rows

UNIFORMS = (np.arange(997) + 0.5) / 997


def one(logits, **row):
    return sample_rows(np.asarray([logits], np.float32), [SamplingRow(**row)])[0]


def frequencies(logits, row):
    """How often each token is chosen over an even grid of uniforms."""
    rows = [row._replace(uniform=float(u)) for u in UNIFORMS]
    tokens = [s.token for s in sample_rows(np.broadcast_to(logits, (len(rows), len(logits))), rows)]
    return np.bincount(tokens, minlength=len(logits)) / len(tokens)


def transformers_probabilities(logits, row):
    """The same filters by transformers, in float64."""
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    history = torch.from_numpy(np.asarray([] if row.history is None else row.history, np.int64))[None]
    if row.repeat_penalty != 1:
        scores = hf.RepetitionPenaltyLogitsProcessor(row.repeat_penalty)(history, scores)
    filters = [hf.TemperatureLogitsWarper(row.temperature)]
    if row.top_k:
        filters.append(hf.TopKLogitsWarper(row.top_k))
    if row.top_p < 1:
        filters.append(hf.TopPLogitsWarper(row.top_p))
    if row.min_p > 0:
        filters.append(hf.MinPLogitsWarper(row.min_p))
    if row.typical_p < 1:
        filters.append(hf.TypicalLogitsWarper(row.typical_p))
    for f in filters:
        scores = f(history, scores)
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize(
    "row",
    [
        SamplingRow(temperature=1.0),
        SamplingRow(temperature=0.3),
        SamplingRow(temperature=2.5),
        SamplingRow(temperature=1.0, top_k=7),
        SamplingRow(temperature=1.0, top_p=0.55),
        SamplingRow(temperature=1.0, top_p=0.97),
        SamplingRow(temperature=1.0, min_p=0.11),
        SamplingRow(temperature=1.0, typical_p=0.3),
        SamplingRow(temperature=1.0, typical_p=0.83),
        SamplingRow(temperature=0.7, top_k=30, top_p=0.9, min_p=0.02, typical_p=0.95),
        SamplingRow(temperature=1.3, repeat_penalty=1.4, history=np.array([3, 3, 5, 17, 40], np.int32)),
        SamplingRow(temperature=0.8, repeat_penalty=0.7, top_k=20, history=np.array([0, 1, 2, 8], np.int32)),
    ],
    ids=lambda row: "-".join(
        f"{k}={v}" for k, v in row._asdict().items() if isinstance(v, int | float) and v != getattr(SamplingRow(), k)
    ),
)
@pytest.mark.parametrize("seed", range(3))
def test_filters_leave_the_distribution_that_transformers_leaves(row, seed):
    logits = np.random.default_rng(seed).normal(0, 2, 61).astype(np.float32)
    expected = transformers_probabilities(logits, row)
    got = frequencies(logits, row)
    # Each token owns an interval of the grid: its count is off by less than one step at either end.
    assert np.abs(got - expected).max() < 1.01 / len(UNIFORMS)
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(expected))


def test_tokens_are_taken_in_order_of_their_ids():
    logits = np.log([0.1, 0.3, 0.2, 0.3, 0.1])
    intervals = [(0.0, 0), (0.09, 0), (0.11, 1), (0.39, 1), (0.41, 2), (0.59, 2), (0.61, 3), (0.89, 3), (0.91, 4)]
    for uniform, token in [*intervals, (math.nextafter(1, 0), 4)]:
        assert one(logits, temperature=1.0, uniform=uniform).token == token


def test_what_filters_leave_is_taken_in_order_of_ids_too():
    logits = np.log([0.1, 0.3, 0.2, 0.35, 0.05])
    for kept in ({"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.5}, {"top_k": 3, "typical_p": 0.99}):
        for uniform, token in [(0.0, 1), (0.34, 1), (0.36, 2), (0.57, 2), (0.6, 3), (0.99, 3)]:
            assert one(logits, temperature=1.0, uniform=uniform, **kept).token == token


def test_zero_temperature_takes_the_first_of_the_most_probable():
    assert one([1, 5, 5, 0], uniform=0.99).token == 1


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    assert one([1, 5, 5.001, 0], temperature=1e-30, uniform=0.99).token == 2


def test_top_k_keeps_tokens_that_tie_with_the_kth():
    assert np.flatnonzero(frequencies(np.float32([2, 1, 1, 0]), SamplingRow(temperature=1, top_k=2))).tolist() == [
        0,
        1,
        2,
    ]


def test_nucleus_and_min_p_always_keep_the_most_probable():
    assert one([0, 1, 0], temperature=1.0, top_p=0.0, uniform=0.999).token == 1
    assert one([0, 1, 0], temperature=1.0, min_p=1.0, uniform=0.999).token == 1


def test_nucleus_stops_at_the_token_that_reaches_the_mass():
    got = frequencies(np.zeros(8, np.float32), SamplingRow(temperature=1, top_p=0.5))
    assert np.flatnonzero(got).tolist() == [0, 1, 2, 3]


def test_frequency_and_presence_penalties_count_the_history():
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence."""
    row = SamplingRow(frequency_penalty=0.5, presence_penalty=0.25, history=np.array([2, 2, 2, 0], np.int32))
    assert adjust_logits(np.float32([1, 1, 1, 1]), row).tolist() == [0.25, 1, -0.75, 1]


def test_penalties_precede_bias_and_the_mask_comes_last():
    row = SamplingRow(
        repeat_penalty=2.0,
        history=np.array([0, 1], np.int32),
        bias={0: 3.0, 3: 100.0},
        allowed=np.array([0b0111], np.uint32),
    )
    assert adjust_logits(np.float32([4, -4, 1, 0]), row).tolist() == [5.0, -8.0, 1.0, -math.inf]


def test_mask_spans_words():
    allowed = np.zeros(3, np.uint32)
    allowed[2] = 1 << 5
    assert one(np.arange(70), allowed=allowed).token == 69


def test_ids_outside_the_vocabulary_are_ignored():
    assert one([0, 1], repeat_penalty=2.0, history=np.array([-1, 2, 99], np.int32), bias={-1: 9.0, 2: 9.0}).token == 1


def test_not_a_number_is_never_chosen_and_infinity_wins():
    assert one([math.nan, 1, -math.inf, 0]).token == 1
    assert one([math.inf, 1, 2, 0], temperature=1.0, uniform=0.9999).token == 0
    assert one([0, 1, 2], bias={0: math.inf}, temperature=1.0, uniform=0.9999).token == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_token_left(temperature):
    for logits, allowed in [([math.nan, -math.inf], None), ([1.0, 2.0], np.zeros(1, np.uint32))]:
        got = one(logits, temperature=temperature, allowed=allowed)
        assert (got.token, got.logprob) == (-1, -math.inf)


def test_log_probabilities_are_those_of_the_raw_logits():
    logits = np.random.default_rng(5).normal(0, 3, 100).astype(np.float32)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    values, ids = expected.topk(4)
    got = one(logits, temperature=5.0, bias={7: 50.0}, top_logprobs=4, uniform=0.5)
    assert got.token == 7
    assert got.logprob == pytest.approx(expected[7].item(), abs=1e-9)
    assert [i for i, _ in got.top] == ids.tolist()
    assert [v for _, v in got.top] == pytest.approx(values.tolist(), abs=1e-9)


def test_top_log_probabilities_leave_out_impossible_tokens():
    assert [i for i, _ in one([math.nan, 1, -math.inf, 1], top_logprobs=4).top] == [1, 3]


def test_log_probabilities_only_where_asked_for():
    assert (one([0, 2, 1]).token, one([0, 2, 1], logprob=False)) == (1, (1, None, []))
    asked = one([0, 2, 1], logprob=False, top_logprobs=1)
    assert asked.top == [(1, asked.logprob)]
