"""What an objective measures beside its loss, as means over what a run saw since it last looked."""

from __future__ import annotations

import torch
from torch import Tensor


class Metrics:
    """Sums of named numbers. What is added without gradients, while the model is evaluated, is kept apart."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, **values: Tensor) -> None:
        """One number each (scalars), or several (vectors), to the mean of that name."""
        for name, value in values.items():
            key = name if torch.is_grad_enabled() else f"validation_{name}"
            total, count = self._sums.get(key, (0.0, 0))
            self._sums[key] = total + value.detach().double().sum().item(), count + value.numel()

    def take(self) -> dict[str, tuple[float, int]]:
        """The sum and the count of each since the last call; those of evaluations are named ``validation_…``."""
        sums, self._sums = self._sums, {}
        return sums

    def means(self) -> dict[str, float]:
        """The means of what ``take`` gives."""
        return {name: total / count for name, (total, count) in self.take().items() if count}
