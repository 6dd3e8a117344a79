"""Kahneman-Tversky optimisation: answers that are said to be good or bad, each by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from puna.train.data.answers import Answers
from puna.train.data.tokens import Packed, Tokens, concatenate
from puna.train.module import LlamaModule
from puna.train.objectives.checks import check_number
from puna.train.objectives.documents import document_logprobs
from puna.train.objectives.frozen import Reference
from puna.train.objectives.metrics import Metrics
from puna.train.objectives.objective import Rows
from puna.train.preferences import kto, kto_kl


@dataclass(frozen=True)
class KTO:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024), which counts answers. Pairs serve too: one answer of each
    is good and one is bad.

    ``beta``: how dear it is to leave the reference. Good and bad answers count ``desirable_weight`` and
    ``undesirable_weight`` times; the paper advises to balance their sums.
    """

    rows: ClassVar[Rows] = "labelled"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        check_number("beta of kto", self.beta, above=0)
        check_number("desirable_weight of kto", self.desirable_weight, low=0)
        check_number("undesirable_weight of kto", self.undesirable_weight, low=0)

    def objective(self, module: LlamaModule) -> LabelledAnswers:
        return LabelledAnswers(self, Reference(module))


class LabelledAnswers:
    """KTO, whose z, the divergence from the reference, is estimated in each micro-batch as in the paper: from every
    prompt with the answer to another one. It is 0 for a micro-batch of one answer."""

    def __init__(self, knobs: KTO, reference: Reference) -> None:
        self.metrics = Metrics()
        self._knobs, self._reference = knobs, reference

    def count(self, micro_batch: Answers) -> int:
        return len(micro_batch.desirable)

    def loss(self, module: LlamaModule, micro_batch: Answers, total: int) -> Tensor:
        knobs = self._knobs
        found = document_logprobs(module, micro_batch.packed)
        before = self._reference.logprobs(micro_batch.packed)
        kl = self._kl(module, micro_batch.packed)
        desirable = torch.from_numpy(micro_batch.desirable).to(found.device)
        rewards = knobs.beta * (found - before).detach()
        self.metrics.add(kl=kl, reward_desirable=rewards[desirable], reward_undesirable=rewards[~desirable])
        losses = kto(found, before, desirable, kl, knobs.beta, knobs.desirable_weight, knobs.undesirable_weight)
        return losses.sum() / max(total, 1)

    def _kl(self, module: LlamaModule, packed: Packed) -> Tensor:
        mismatched = mismatch(packed.documents)
        with torch.no_grad():
            found = document_logprobs(module, mismatched)
        kl = kto_kl(found, self._reference.logprobs(mismatched))
        # Of one answer it is computed too: every micro-batch runs the module as often as any other.
        return kl if len(mismatched.documents) > 1 else torch.zeros_like(kl)


def mismatch(documents: list[Tokens]) -> Packed:
    """Every document's prompt, and the answer of the one before it, the last one's for the first."""
    prompts, answers = zip(*map(_split, documents), strict=True)
    return concatenate([_join(prompts[number], answers[number - 1]) for number in range(len(documents))])


def _split(document: Tokens) -> tuple[Tokens, Tokens]:
    start = int(document.trained.argmax())
    halves = (slice(0, start), slice(start, None))
    before, after = (Tokens(document.ids[half], document.trained[half]) for half in halves)
    return before, after


def _join(prompt: Tokens, answer: Tokens) -> Tokens:
    return Tokens(np.concatenate([prompt.ids, answer.ids]), np.concatenate([prompt.trained, answer.trained]))
