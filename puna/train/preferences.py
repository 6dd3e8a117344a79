"""Losses of preferences, as functions of log probabilities: one loss for each pair or answer, float[N].

``chosen`` and ``rejected`` are the log probabilities of the two answers to each prompt under the model in training,
``reference_…`` those under the model it started from. They are sums over the answer's tokens (``answer_logprobs``),
where a loss does not say that it takes means.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def answer_logprobs(logprobs: Tensor, answers: Tensor, count: int, *, mean: bool = False) -> Tensor:
    """Log probabilities of whole answers, [count]: sums or means of their tokens', [R]; ``answers`` int64[R]: whose."""
    sums = torch.zeros(count, dtype=logprobs.dtype, device=logprobs.device).index_add(0, answers, logprobs)
    return sums / torch.bincount(answers, minlength=count).clamp(min=1) if mean else sums


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7): -log sigmoid(beta · margin).

    ``label_smoothing`` is the probability that a pair is the wrong way round (Mitchell 2023).
    """
    margin = beta * _margin(chosen, rejected, reference_chosen, reference_rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """Identity preference optimisation (Azar et al. 2023, eq. 17): (margin - 1 / (2 · beta))², of means by token."""
    return (_margin(chosen, rejected, reference_chosen, reference_rejected) - 1 / (2 * beta)).square()


def kto(
    logprobs: Tensor,
    reference: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, eq. 8): of single answers, ``desirable`` (bool[N]) or not.

    weight · (1 - sigmoid(±beta · (log ratio - z))), where z is ``kl`` (``kto_kl``) and takes no gradient.
    """
    gain = beta * (logprobs - reference - kl.detach())
    return torch.where(
        desirable, desirable_weight * (1 - torch.sigmoid(gain)), undesirable_weight * (1 - torch.sigmoid(-gain))
    )


def kto_kl(mismatched: Tensor, reference_mismatched: Tensor) -> Tensor:
    """KTO's estimate of the divergence from the reference, a scalar >= 0, from answers that belong to other prompts."""
    return (mismatched - reference_mismatched).mean().clamp(min=0).detach()


def orpo(chosen: Tensor, rejected: Tensor, beta: float = 0.1) -> Tensor:
    """Odds ratio preference optimisation (Hong et al. 2024, eq. 7), of means by token, without a reference.

    beta · -log sigmoid(log odds(chosen) - log odds(rejected)); the cross entropy of the chosen answers is to be added.
    """
    return -beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo(chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Simple preference optimisation (Meng et al. 2024, eq. 6), of means by token, without a reference.

    -log sigmoid(beta · (chosen - rejected) - gamma).
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def reward(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Of a reward model's scores (Bradley & Terry 1952; margin: Touvron et al. 2023): -log sigmoid(difference)."""
    return -F.logsigmoid(chosen - rejected - margin)


def _margin(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)). A p of 1, which rounding can give, has the largest odds that are a number."""
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    return logprob - torch.log(-torch.expm1(logprob))
