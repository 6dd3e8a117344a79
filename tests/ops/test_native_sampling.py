"""The native sampler gives the tokens of its specification, reference_sampling.py.

Masses of many tokens are summed in float32, so where ``uniform`` or ``top_p`` is within such a rounding of a boundary,
a token beside it may be given.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from puna.ops.protocol import Sampled, SamplingRow
from puna.ops.reference_sampling import _candidates, _finite, adjust_logits, sample_rows

native = pytest.importorskip("puna._native", reason="the native extension is not built")
SETS = {isa: native.Native(2, isa) for isa in native.instruction_sets()}


def native_rows(isa, logits, rows):
    return [Sampled(*s) for s in SETS[isa].sample(np.ascontiguousarray(logits, np.float32), rows)]


ROUNDING = 2e-6


def may_be_chosen(token, raw, row):
    """Whether the specification gives this token to some uniform and top_p within ROUNDING of the row's."""
    with np.errstate(all="ignore"):
        for top_p in {row.top_p, row.top_p * (1 - ROUNDING), row.top_p + (1 - row.top_p) * ROUNDING}:
            ids, weights = _candidates(adjust_logits(_finite(raw), row), row._replace(top_p=top_p))
            order = np.argsort(ids)
            ends = np.cumsum(weights[order]) / weights.sum()
            (place,) = np.flatnonzero(ids[order] == token) if token in ids else (None,)
            begin = 0 if place in (None, 0) else ends[place - 1]
            if place is not None and begin - ROUNDING <= row.uniform <= ends[place] + ROUNDING:
                return True
    return False


def assert_same(logits, rows):
    """Tokens as specified; log probabilities within the float32 that the kernel sums them in.

    Returns the share of tokens that are exactly the specification's.
    """
    expected, equal = sample_rows(logits, rows), []
    for isa in SETS:
        for raw, row, got, want in zip(logits, rows, native_rows(isa, logits, rows), expected, strict=True):
            equal.append(got.token == want.token)
            if not equal[-1]:
                assert may_be_chosen(got.token, raw, row), isa
                continue
            assert got.logprob == pytest.approx(want.logprob, rel=1e-6, abs=2e-6)
            assert [i for i, _ in got.top] == [i for i, _ in want.top]
            assert [v for _, v in got.top] == pytest.approx([v for _, v in want.top], rel=1e-6, abs=2e-6)
    return np.mean(equal)


# Few distinct values make ties; the specials must not spread.
logit = st.one_of(
    st.floats(-20, 20, width=32),
    st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0]),
    st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38]),
)


@st.composite
def problems(draw):
    vocabulary = draw(st.integers(1, 200))
    logits = draw(arrays(np.float32, (draw(st.integers(1, 3)), vocabulary), elements=logit))
    fraction = st.one_of(st.just(1.0), st.floats(0, 1, width=32))
    rows = [
        SamplingRow(
            temperature=draw(st.one_of(st.just(0.0), st.floats(0.0625, 5, width=16))),
            top_k=draw(st.integers(0, vocabulary + 2)),
            top_p=draw(fraction),
            min_p=draw(st.one_of(st.just(0.0), st.floats(0, 1, width=32))),
            typical_p=draw(fraction),
            repeat_penalty=draw(st.one_of(st.just(1.0), st.floats(0.5, 2, width=16))),
            presence_penalty=draw(st.one_of(st.just(0.0), st.floats(-2, 2, width=16))),
            frequency_penalty=draw(st.one_of(st.just(0.0), st.floats(-2, 2, width=16))),
            history=np.array(draw(st.lists(st.integers(-1, vocabulary), max_size=8)), np.int32),
            bias=draw(st.dictionaries(st.integers(-1, vocabulary), st.floats(-100, 100, width=16), max_size=3)),
            allowed=draw(st.none() | arrays(np.uint32, -(-vocabulary // 32))),
            uniform=draw(st.integers(0, 2**20 - 1)) / 2**20,
            top_logprobs=draw(st.integers(0, 6)),
        )
        for _ in logits
    ]
    return logits, rows


@settings(max_examples=400, deadline=None)
@given(problems())
def test_any_row_gives_the_token_of_the_specification(problem):
    assert_same(*problem)


FILTERS = [
    SamplingRow(top_logprobs=20),
    SamplingRow(temperature=1.0),
    SamplingRow(temperature=0.6),
    SamplingRow(temperature=4.0),
    SamplingRow(temperature=1.0, top_k=1),
    SamplingRow(temperature=1.0, top_k=40),
    SamplingRow(temperature=1.0, top_k=3000),
    SamplingRow(temperature=1.0, top_p=0.95),
    SamplingRow(temperature=1.0, top_p=0.1),
    SamplingRow(temperature=3.0, top_p=0.999),
    SamplingRow(temperature=0.7, top_p=0.5),
    SamplingRow(temperature=1.0, min_p=0.05),
    SamplingRow(temperature=1.0, min_p=1e-4),
    SamplingRow(temperature=1.0, top_p=0.99, min_p=1e-3),
    SamplingRow(temperature=1.0, typical_p=0.9),
    SamplingRow(temperature=0.8, top_k=100, top_p=0.9, min_p=0.01, typical_p=0.95),
    SamplingRow(temperature=1.0, top_p=0.9, repeat_penalty=1.3, history=np.arange(0, 49000, 7, dtype=np.int32)),
]


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("row", FILTERS, ids=range(len(FILTERS)))
def test_real_vocabularies(row, spread):
    """Vocabularies that aren't sorted whole; flat, mild and peaked distributions; changed and forbidden tokens."""
    rng = np.random.default_rng(7)
    logits = rng.normal(0, spread, (12, 49152)).astype(np.float32)
    logits[1] = logits[1].round(1)  # many ties
    logits[2, 30000:30005] += 9  # all but certain
    uniforms = [0.0, 0.3, 0.77, 0.95, 0.9999, 1 - 1e-8, *rng.random(6)]
    allowed = rng.integers(0, 2**32, 49152 // 32, np.uint32)
    few = np.zeros_like(allowed)
    few[::50] = 7
    rows = [row._replace(uniform=u, allowed={4: allowed, 5: few, 8: allowed}.get(i)) for i, u in enumerate(uniforms)]
    rows[9] = rows[9]._replace(bias={40000: 300.0, 7: -math.inf})  # what was summed before is nothing beside it
    rows[10] = rows[10]._replace(bias=dict.fromkeys(np.argsort(-logits[10])[:70].tolist(), -math.inf))
    assert assert_same(logits, rows) > 0.7  # of the uniforms, two are at a boundary by choice
    for isa in SETS:  # the choice does not depend on what is told of it
        silent = native_rows(isa, logits, [row._replace(logprob=False, top_logprobs=0) for row in rows])
        assert silent == [Sampled(chosen.token, None, []) for chosen in native_rows(isa, logits, rows)]


def test_the_last_uniform_takes_the_last_token_that_is_left():
    logits = np.float32([[1, 5, 3, 4, 2, -100]])
    for kept, token in [({"top_k": 2}, 3), ({"top_p": 0.7}, 3), ({"min_p": 0.04}, 4), ({}, 4)]:
        row = SamplingRow(temperature=1.0, uniform=math.nextafter(1, 0), **kept)
        assert {native_rows(isa, logits, [row])[0].token for isa in SETS} == {token}


@pytest.mark.parametrize("isa", SETS)
def test_every_token_is_drawn_as_often_as_it_is_probable(isa):
    """An even grid of uniforms gives each token its probability, to one step of the grid."""
    logits = np.random.default_rng(3).normal(0, 2, 80).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    steps = 5000
    rows = [SamplingRow(temperature=1.0, uniform=(i + 0.5) / steps) for i in range(steps)]
    tokens = [s.token for s in native_rows(isa, np.broadcast_to(logits, (steps, 80)), rows)]
    assert np.abs(np.bincount(tokens, minlength=80) / steps - probabilities).max() < 1.01 / steps


def nucleus_by_hand(probabilities, top_p):
    order = np.argsort(-probabilities, kind="stable")
    kept = order[np.cumsum(probabilities[order]) - probabilities[order] < top_p]
    return np.isin(np.arange(len(probabilities)), kept)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(
    ("fields", "keeps"),
    [
        ({}, lambda p: p > 0),
        ({"temperature": 0.6}, lambda p: p > 0),
        ({"min_p": 0.1}, lambda p: p >= 0.1 * p.max()),
        ({"top_p": 0.8}, lambda p: nucleus_by_hand(p, 0.8)),
        ({"top_p": 0.8, "temperature": 1.5}, lambda p: nucleus_by_hand(p, 0.8)),
        ({"top_k": 100}, lambda p: p >= np.sort(p)[-100]),
    ],
    ids=str,
)
def test_chance_gives_tokens_their_probabilities(isa, fields, keeps):
    """Pearson's chi-square over 20,000 drawn tokens of a flat distribution, where no few have most mass."""
    rng = np.random.default_rng(17)
    logits = rng.normal(0, 0.7, 640).astype(np.float32)
    probabilities = np.exp(logits / fields.get("temperature", 1.0), dtype=np.float64)
    probabilities /= probabilities.sum()
    kept = keeps(probabilities)
    expected = np.where(kept, probabilities, 0) / probabilities[kept].sum()
    counts = np.zeros(640)
    rounds, draws = 5, 4000
    for _ in range(rounds):
        rows = [SamplingRow(**{"temperature": 1.0, **fields}, uniform=u) for u in rng.random(draws)]
        tokens = [s.token for s in native_rows(isa, np.broadcast_to(logits, (draws, 640)), rows)]
        counts += np.bincount(tokens, minlength=640)
    assert not counts[~kept].any()
    expected = expected[kept] * rounds * draws
    chi_square, freedom = np.sum((counts[kept] - expected) ** 2 / expected), kept.sum() - 1
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("isa", SETS)
def test_a_row_does_not_depend_on_the_batch(isa):
    rng = np.random.default_rng(11)
    logits = rng.normal(0, 2, (40, 3000)).astype(np.float32)
    rows = [
        SamplingRow(
            temperature=1.2,
            top_p=0.9,
            frequency_penalty=0.3,
            history=rng.integers(0, 3000, 50).astype(np.int32),
            uniform=float(rng.random()),
            top_logprobs=3,
        )
        for _ in logits
    ]
    together = native_rows(isa, logits, rows)
    assert together == [native_rows(isa, logits[i : i + 1], rows[i : i + 1])[0] for i in range(len(rows))]


@pytest.mark.parametrize("isa", SETS)
def test_no_token_left(isa):
    logits = np.float32([[math.nan, -math.inf, -math.inf], [1, 2, 3]])
    rows = [
        SamplingRow(temperature=1.0, top_logprobs=2),
        SamplingRow(allowed=np.zeros(1, np.uint32), top_logprobs=1),
    ]
    first, second = native_rows(isa, logits, rows)
    assert first == Sampled(-1, -math.inf, [])
    assert (second.token, second.logprob, second.top[0][0]) == (-1, -math.inf, 2)


@pytest.mark.parametrize("isa", SETS)
def test_misshapen_requests_are_refused(isa):
    logits = np.zeros((1, 70), np.float32)
    with pytest.raises(ValueError, match="mask"):
        native_rows(isa, logits, [SamplingRow(allowed=np.zeros(2, np.uint32))])
    with pytest.raises(ValueError, match="rows"):
        native_rows(isa, logits, [])
