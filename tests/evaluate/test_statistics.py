"""The numbers of a comparison against values worked out by hand, in plain Python, and laws that they obey."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from puna.evaluate.statistics import LayerErrors, compare_logits, log_softmax, perplexity, quantiles

LOGITS = arrays(np.float32, st.tuples(st.integers(1, 70), st.integers(2, 9)), elements=st.floats(-60, 60, width=32))


def targets_of(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.arange(len(logits)) % logits.shape[1]


def by_hand(source: NDArray[np.float32], derived: NDArray[np.float32]) -> list[float]:
    """KL in plain Python, from the definition."""
    values = []
    for ours, theirs in zip(source.tolist(), derived.tolist(), strict=True):
        p, q = ([math.exp(x - max(row)) for x in row] for row in (ours, theirs))
        p, q = ([x / math.fsum(row) for x in row] for row in (p, q))
        values.append(math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    return values


def test_a_divergence_worked_out_by_hand() -> None:
    source = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    derived = np.log(np.array([[0.25, 0.5, 0.25]], np.float32))
    found = compare_logits(source, derived, np.array([1]))
    assert found.kl[0] == pytest.approx(0.25 * math.log(2))
    assert found.source_nll[0] == pytest.approx(math.log(4))
    assert found.derived_nll[0] == pytest.approx(math.log(2))
    assert not found.same_top[0]


def test_the_perplexity_of_knowing_nothing_is_the_size_of_the_vocabulary() -> None:
    found = compare_logits(np.zeros((40, 7), np.float32), np.zeros((40, 7), np.float32), np.zeros(40, np.int64))
    assert perplexity(found.source_nll) == pytest.approx(7)
    assert perplexity(np.array([5000.0])) == pytest.approx(1e300)


@given(LOGITS)
def test_divergence_is_that_of_the_definition(source: NDArray[np.float32]) -> None:
    derived = np.clip(source[:, ::-1] * np.float32(0.4), -12, 12)
    source = np.clip(source, -12, 12)
    found = compare_logits(source, derived, targets_of(source))
    np.testing.assert_allclose(found.kl, by_hand(source, derived), rtol=1e-9, atol=1e-12)
    assert (found.kl >= 0).all()


@given(LOGITS, st.floats(-50, 50, width=32))
def test_a_model_does_not_diverge_from_itself(logits: NDArray[np.float32], shift: float) -> None:
    """Nor from one whose logits all are greater by the same."""
    found = compare_logits(logits, logits, targets_of(logits))
    assert (found.kl == 0).all()
    assert found.same_top.all()
    assert (found.source_nll == found.derived_nll).all()
    shifted = compare_logits(logits, logits + np.float32(shift), targets_of(logits))
    assert (shifted.kl < 1e-4).all()


@given(LOGITS)
def test_probabilities_sum_to_one(logits: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(np.exp(log_softmax(logits)).sum(axis=-1), 1)


def test_rows_are_told_apart() -> None:
    """However they are cut: each row's numbers are those it has alone."""
    rng = np.random.default_rng(0)
    source, derived = rng.normal(size=(2, 75, 11)).astype(np.float32)
    targets = rng.integers(0, 11, 75)
    together = compare_logits(source, derived, targets)
    for row in (0, 31, 32, 74):
        alone = compare_logits(source[row : row + 1], derived[row : row + 1], targets[row : row + 1])
        assert alone.kl[0] == together.kl[row]
        assert alone.derived_nll[0] == together.derived_nll[row]


def test_layer_errors_add_up_over_windows() -> None:
    errors = LayerErrors()
    rng = np.random.default_rng(1)
    windows = [(rng.normal(size=(5, 8)), rng.normal(size=(5, 8))) for _ in range(3)]
    for source, noise in windows:
        errors.add(0, source.astype(np.float32), (1.25 * source).astype(np.float32))
        errors.add(1, source.astype(np.float32), (source + noise).astype(np.float32))
    scaled, noisy = errors.relative()
    assert scaled == pytest.approx(0.25, rel=1e-6)
    noise = np.linalg.norm(np.concatenate([noise for _, noise in windows]))
    assert noisy == pytest.approx(noise / np.linalg.norm(np.concatenate([source for source, _ in windows])), rel=1e-6)


def test_quantiles_of_a_ramp() -> None:
    assert quantiles(np.arange(101.0)) == pytest.approx(np.arange(0, 101, 5))
