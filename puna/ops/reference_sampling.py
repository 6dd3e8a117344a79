"""Sampling in numpy: the executable specification of ``Ops.sample``; the native kernel follows it.

The order of tokens is decided on float32 logits and everything after that is float64. The native kernel sums masses of
many tokens in float32, so it may disagree where ``uniform`` or ``top_p`` is within such a rounding (1e-6) of the
boundary between two tokens. A SamplingRow's numbers are taken as float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from puna.ops.protocol import Sampled, SamplingRow

LARGEST = np.finfo(np.float32).max


def sample_rows(logits: NDArray[np.float32], rows: Sequence[SamplingRow]) -> list[Sampled]:
    """Choose one token for each row of logits [R, V], as SamplingRow describes.

    NaN logits count as -inf and +inf as the largest float32. Ids outside the vocabulary, in ``history`` or ``bias``,
    are ignored. Where no token is left to choose, ``token`` is -1 and ``logprob`` is -inf. ``top`` leaves out tokens
    whose logit is -inf.
    """
    with np.errstate(all="ignore"):
        return [_sample_row(_finite(raw), row) for raw, row in zip(logits, rows, strict=True)]


def _sample_row(raw: NDArray[np.float32], row: SamplingRow) -> Sampled:
    ids, weights = _candidates(adjust_logits(raw, row), row)
    token = -1
    if len(ids):
        order = np.argsort(ids)
        cumulative = np.cumsum(weights[order])
        chosen = np.searchsorted(cumulative, row.uniform * cumulative[-1], side="right")
        token = int(ids[order[min(chosen, len(ids) - 1)]])
    if not (row.logprob or row.top_logprobs > 0):
        return Sampled(token, None, [])
    logprobs = np.maximum(raw.astype(np.float64) - _log_sum_exp(raw), -float(LARGEST))
    order = np.argsort(-raw, kind="stable")[: row.top_logprobs]
    top = [(int(i), float(logprobs[i])) for i in order if raw[i] > -np.inf]
    return Sampled(token, float(logprobs[token]) if token >= 0 else -math.inf, top)


def adjust_logits(raw: NDArray[np.float32], row: SamplingRow) -> NDArray[np.float32]:
    """Penalties, bias and the mask of allowed tokens: float32[V] -> float32[V], disallowed tokens at -inf."""
    x: NDArray[np.float32] = raw.copy()
    history = np.empty(0, np.int32) if row.history is None else row.history
    seen, counts = np.unique(history[(history >= 0) & (history < len(x))], return_counts=True)
    repeat = np.float32(row.repeat_penalty)
    x[seen] = np.where(x[seen] < 0, x[seen] * repeat, x[seen] / repeat)
    x[seen] = (x[seen] - float(np.float32(row.frequency_penalty)) * counts) - float(np.float32(row.presence_penalty))
    x[seen] = _finite(x[seen])
    bias = {token: value for token, value in (row.bias or {}).items() if 0 <= token < len(x)}
    x[list(bias)] = _finite(x[list(bias)] + np.array(list(bias.values()), np.float32))
    if row.allowed is not None:
        bits = np.unpackbits(row.allowed.astype("<u4").view(np.uint8), bitorder="little")
        x[bits[: len(x)] == 0] = -np.inf
    return x


def _candidates(x: NDArray[np.float32], row: SamplingRow) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The tokens that may be chosen, most probable first (ties: lower id first), with unnormalised probabilities."""
    temperature, top_p, min_p, typical_p = (
        float(np.float32(value)) for value in (row.temperature, row.top_p, row.min_p, row.typical_p)
    )
    ids = np.argsort(-x, kind="stable")
    ids = ids[x[ids] > -np.inf]
    if not temperature > 0 or len(ids) == 0:
        return ids[:1], np.ones(len(ids[:1]))
    if 0 < row.top_k < len(ids):  # tokens that tie with the k-th stay
        ids = ids[x[ids] >= x[ids[row.top_k - 1]]]
    z = (x[ids].astype(np.float64) - float(x[ids[0]])) / temperature
    weights = np.exp(z)
    possible = int(np.count_nonzero(weights))  # the rest underflow
    if top_p < 1:  # nucleus (Holtzman et al. 2020): until the tokens taken reach a mass of top_p
        cumulative = np.cumsum(weights)
        possible = min(possible, 1 + int(np.searchsorted(cumulative, top_p * cumulative[-1], side="left")))
    ids, z, weights = ids[:possible], z[:possible], weights[:possible]
    if min_p > 0:
        keep = z >= min(math.log(min_p), 0.0)
        ids, z, weights = ids[keep], z[keep], weights[keep]
    if typical_p < 1:
        keep = _typical(z, weights, typical_p)
        ids, weights = ids[keep], weights[keep]
    return ids, weights


def _typical(z: NDArray[np.float64], weights: NDArray[np.float64], mass: float) -> NDArray[np.bool_]:
    """Locally typical tokens (Meister et al. 2022): those whose surprise is nearest to the entropy, up to ``mass``."""
    total = weights.sum()
    surprise = math.log(total) - z
    distance = np.abs(surprise - np.sum(weights * surprise) / total)
    order = np.argsort(distance, kind="stable")
    last = int(np.count_nonzero(np.cumsum(weights[order]) < mass * total))
    keep: NDArray[np.bool_] = distance <= distance[order[min(last, len(order) - 1)]]
    return keep


def _finite(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.nan_to_num(x, nan=-np.inf, posinf=LARGEST, neginf=-np.inf)


def _log_sum_exp(x: NDArray[np.float32]) -> float:
    wide = x.astype(np.float64)
    top = wide.max()
    return float(top + np.log(np.exp(wide - top).sum())) if top > -np.inf else 0.0
