"""The numbers that say how far two models' predictions are apart, in float64 and a few rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROWS = 32
QUANTILES = 21

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """What two models expected at the same places; one number for each.

    ``kl``: KL(source ‖ derived) = Σ p · (ln p - ln q) over the vocabulary, in nats (Kullback & Leibler 1951).
    ``source_nll``, ``derived_nll``: -ln of the probability of the token that came. ``same_top``: whether both find the
    same token most probable.
    """

    kl: Floats
    source_nll: Floats
    derived_nll: Floats
    same_top: NDArray[np.bool_]

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Those of several texts."""
        return cls(
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.source_nll for part in parts]),
            np.concatenate([part.derived_nll for part in parts]),
            np.concatenate([part.same_top for part in parts]),
        )


def compare_logits(
    source: NDArray[np.float32], derived: NDArray[np.float32], targets: NDArray[np.int64]
) -> Predictions:
    """Compare finite logits [R, V] of the two models at places after which ``targets`` [R] came."""
    return Predictions.join(
        [
            _compare_rows(source[start : start + ROWS], derived[start : start + ROWS], targets[start : start + ROWS])
            for start in range(0, len(targets), ROWS)
        ]
    )


def log_softmax(logits: NDArray[np.float32]) -> Floats:
    """Natural logarithms of the probabilities, float64[R, V]."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def perplexity(nll: Floats) -> float:
    """exp of the mean negative log probability of a token; at most 1e300, so that it stays a number."""
    return float(np.exp(min(nll.mean(), np.log(1e300))))


def quantiles(values: Floats) -> list[float]:
    """The values at 0, 5, … 100 % of their order."""
    return [float(value) for value in np.quantile(values, np.linspace(0, 1, QUANTILES))]


class LayerErrors:
    """How far the states after each layer are apart: ‖derived - source‖ / ‖source‖ over all tokens (Frobenius)."""

    def __init__(self) -> None:
        self._sums: list[Floats] = []

    def add(self, layer: int, source: NDArray[np.float32], derived: NDArray[np.float32]) -> None:
        """Count the states [R, D] after ``layer``, from 0; a new layer follows the last known one."""
        if layer == len(self._sums):
            self._sums.append(np.zeros(2))
        wide = source.astype(np.float64)
        self._sums[layer] += np.square(derived - wide).sum(), np.square(wide).sum()

    def relative(self) -> list[float]:
        """One number for each layer."""
        return [float(np.sqrt(error / max(norm, np.finfo(np.float64).tiny))) for error, norm in self._sums]


def _compare_rows(source: NDArray[np.float32], derived: NDArray[np.float32], targets: NDArray[np.int64]) -> Predictions:
    p, q = log_softmax(source), log_softmax(derived)
    rows = np.arange(len(targets))
    # Rounding may leave it below 0 by some 1e-16.
    kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)
    return Predictions(kl, -p[rows, targets], -q[rows, targets], source.argmax(axis=-1) == derived.argmax(axis=-1))
