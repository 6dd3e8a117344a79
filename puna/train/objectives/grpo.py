"""Group relative policy optimisation (Shao et al. 2024, eq. 3): answers that are rewarded more than others to a prompt.

Micro-batches are Rollouts: the answers to one prompt, of puna/train/rollouts.py. The loss counts answers, and is a mean
over the tokens of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.train.data.tokens import Packed
from puna.train.module import LlamaModule
from puna.train.objectives.checks import check_number, check_whole
from puna.train.objectives.documents import policy_logprobs
from puna.train.objectives.metrics import Metrics
from puna.train.objectives.objective import Rows
from puna.train.preferences import answer_logprobs
from puna.train.rewards import reward_named

_STEADY = 1e-4  # added to the deviation of rewards, as TRL does, for groups of equal ones


@dataclass(frozen=True)
class GRPO:
    """Knobs of GRPO.

    ``reward`` (``exact``, ``number``, ``regex`` with a ``pattern``, ``json`` with a ``schema``'s path) judges answers.
    To each of ``prompts`` prompts ``group`` answers of at most ``max_tokens`` are sampled at ``temperature``, and
    learnt from ``updates`` times. ``epsilon`` clips the ratio of probabilities; ``beta`` weighs the divergence from the
    model before training.
    """

    rows: ClassVar[Rows] = "prompts"
    reward: str
    pattern: str | None = None
    schema: str | None = None
    group: int = 8
    prompts: int = 4
    updates: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    epsilon: float = 0.2
    beta: float = 0.04

    def __post_init__(self) -> None:
        reward_named(self.reward, self.pattern, self.schema)
        check_whole("group of grpo", self.group, 2)
        for name in ("prompts", "updates", "max_tokens"):
            check_whole(f"{name} of grpo", getattr(self, name), 1)
        check_number("temperature of grpo", self.temperature, above=0)
        check_number("epsilon of grpo", self.epsilon, above=0, high=1)
        check_number("beta of grpo", self.beta, low=0)

    def objective(self, module: LlamaModule) -> ClippedPolicy:
        return ClippedPolicy(self)


@dataclass(frozen=True)
class Rollouts:
    """Answers to one prompt: documents of which the answers are trained, as in Packed.

    ``rewards`` and ``advantages`` float[D]; ``sampled`` and ``reference`` float[R]: the log probabilities of trained
    tokens under the policy that sampled them, and under the model before training.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    seq_starts: NDArray[np.int32]
    rewards: NDArray[np.float64]
    advantages: NDArray[np.float64]
    sampled: NDArray[np.float64]
    reference: NDArray[np.float64]

    @property
    def packed(self) -> Packed:
        return Packed(self.ids, self.trained, self.seq_starts)


class ClippedPolicy:
    """The clipped surrogate of GRPO, with its estimate of the divergence: r - log r - 1 (Schulman 2020)."""

    def __init__(self, knobs: GRPO) -> None:
        self.metrics = Metrics()
        self._knobs = knobs

    def count(self, micro_batch: Rollouts) -> int:
        return len(micro_batch.rewards)

    def loss(self, module: LlamaModule, micro_batch: Rollouts, total: int) -> Tensor:
        knobs = self._knobs
        found, owners = policy_logprobs(module, micro_batch.packed, knobs.temperature)
        sampled, reference, advantages, rewards = (
            torch.from_numpy(array).to(found)
            for array in (micro_batch.sampled, micro_batch.reference, micro_batch.advantages, micro_batch.rewards)
        )
        ratio, gain = (found - sampled).exp(), advantages[owners]
        clipped = ratio.clamp(1 - knobs.epsilon, 1 + knobs.epsilon)
        difference = reference - found
        divergence = difference.exp() - difference - 1
        by_token = -torch.minimum(ratio * gain, clipped * gain) + knobs.beta * divergence
        self.metrics.add(reward=rewards, kl=divergence, clipped=(clipped * gain < ratio * gain).float())
        return answer_logprobs(by_token, owners, len(rewards), mean=True).sum() / max(total, 1)


def group_advantages(rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many standard deviations each reward is above its group's mean, float[D]."""
    advantages: NDArray[np.float64] = (rewards - rewards.mean()) / (rewards.std(ddof=1) + _STEADY)
    return advantages
