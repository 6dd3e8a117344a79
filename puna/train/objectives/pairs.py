"""Preferences between pairs of answers: DPO, IPO, ORPO and SimPO. The formulas are those of puna/train/preferences.py.

The loss is a mean over pairs, so it counts pairs. Micro-batches are Answers of which 2i is chosen and 2i + 1 rejected.
The reward of an answer, which the metrics speak of, is beta · log(probability / the reference's), or without a
reference beta · the mean log probability by token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from puna.errors import DataError
from puna.train.data.answers import Answers
from puna.train.module import LlamaModule
from puna.train.objectives.checks import check_number
from puna.train.objectives.documents import document_logprobs
from puna.train.objectives.frozen import Reference
from puna.train.objectives.metrics import Metrics
from puna.train.objectives.objective import Rows
from puna.train.preferences import dpo, ipo, orpo, simpo

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def count_pairs(micro_batch: Answers) -> int:
    """Raises DataError unless chosen and rejected answers take turns."""
    if len(micro_batch.desirable) % 2 or not (micro_batch.desirable[::2] & ~micro_batch.desirable[1::2]).all():
        raise DataError("this objective compares two answers to each prompt; give it rows with chosen and rejected")
    return len(micro_batch.desirable) // 2


def measure_rewards(metrics: Metrics, chosen: Tensor, rejected: Tensor) -> None:
    """``accuracy`` is the share of pairs whose chosen answer has the greater reward; equal ones count half."""
    chosen, rejected = chosen.detach(), rejected.detach()
    margin = chosen - rejected
    metrics.add(accuracy=(margin.sign() + 1) / 2, margin=margin, reward_chosen=chosen, reward_rejected=rejected)


class PairedPreference:
    """The mean over pairs of ``loss(chosen, rejected, reference chosen, reference rejected)``, log probabilities.

    ``mean``: these are means by token, not sums. Without a ``reference`` they are compared with 0.
    """

    def __init__(self, loss: PairLoss, beta: float, *, mean: bool, reference: Reference | None) -> None:
        self.metrics = Metrics()
        self._loss, self._beta, self._mean, self._reference = loss, beta, mean, reference

    def count(self, micro_batch: Answers) -> int:
        return count_pairs(micro_batch)

    def loss(self, module: LlamaModule, micro_batch: Answers, total: int) -> Tensor:
        found = document_logprobs(module, micro_batch.packed, mean=self._mean)
        reference = self._before(micro_batch, found)
        ratios = self._beta * (found - reference)
        measure_rewards(self.metrics, ratios[::2], ratios[1::2])
        return self._loss(found[::2], found[1::2], reference[::2], reference[1::2]).sum() / max(total, 1)

    def _before(self, micro_batch: Answers, found: Tensor) -> Tensor:
        if self._reference is None:
            return torch.zeros_like(found)
        return self._reference.logprobs(micro_batch.packed, mean=self._mean)


@dataclass(frozen=True)
class DPO:
    """Direct preference optimisation (Rafailov et al. 2023).

    ``beta``: how dear it is to leave the reference. ``label_smoothing``: how often a pair is the wrong way round.
    """

    rows: ClassVar[Rows] = "pairs"
    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_number("beta of dpo", self.beta, above=0)
        check_number("label_smoothing of dpo", self.label_smoothing, low=0, high=0.5)

    def objective(self, module: LlamaModule) -> PairedPreference:
        def loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
            return dpo(chosen, rejected, reference_chosen, reference_rejected, self.beta, self.label_smoothing)

        return PairedPreference(loss, self.beta, mean=False, reference=Reference(module))


@dataclass(frozen=True)
class IPO:
    """Identity preference optimisation (Azar et al. 2023): margins by token go towards 1 / (2 · ``beta``)."""

    rows: ClassVar[Rows] = "pairs"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_number("beta of ipo", self.beta, above=0)

    def objective(self, module: LlamaModule) -> PairedPreference:
        def loss(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
            return ipo(chosen, rejected, reference_chosen, reference_rejected, self.beta)

        return PairedPreference(loss, self.beta, mean=True, reference=Reference(module))


@dataclass(frozen=True)
class ORPO:
    """Odds ratio preference optimisation (Hong et al. 2024), which needs no reference: the cross entropy by token of
    the chosen answer, and ``beta`` times the loss of the odds ratio."""

    rows: ClassVar[Rows] = "pairs"
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_number("beta of orpo", self.beta, above=0)

    def objective(self, module: LlamaModule) -> PairedPreference:
        def loss(chosen: Tensor, rejected: Tensor, *no_reference: Tensor) -> Tensor:
            return orpo(chosen, rejected, self.beta) - chosen

        return PairedPreference(loss, self.beta, mean=True, reference=None)


@dataclass(frozen=True)
class SimPO:
    """Simple preference optimisation (Meng et al. 2024), which needs no reference: log probabilities by token, scaled
    by ``beta``, are to differ by ``gamma``."""

    rows: ClassVar[Rows] = "pairs"
    beta: float = 2.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_number("beta of simpo", self.beta, above=0)
        check_number("gamma of simpo", self.gamma, low=0)

    def objective(self, module: LlamaModule) -> PairedPreference:
        def loss(chosen: Tensor, rejected: Tensor, *no_reference: Tensor) -> Tensor:
            return simpo(chosen, rejected, self.beta, self.gamma)

        return PairedPreference(loss, self.beta, mean=True, reference=None)
