"""Whole documents through a model: where their trained tokens are predicted, and how probable these are.

D documents in one sequence of T tokens, R of them trained; H numbers to a hidden state, V tokens in the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from puna.ops.protocol import Batch
from puna.ops.torch_ops import TorchOps, document_batch
from puna.train.data.tokens import Packed
from puna.train.losses import prediction_rows, token_logprobs
from puna.train.preferences import answer_logprobs


class HiddenModel(Protocol):
    """What objectives need of a model; LlamaModule and FrozenModel have it."""

    @property
    def ops(self) -> TorchOps: ...

    def hidden(self, batch: Batch) -> Tensor:
        """The normalised hidden states [T, H] that the head reads."""

    def head(self) -> Tensor:
        """The head [V, H] in numbers."""


@dataclass(frozen=True)
class Predictions:
    """The trained tokens of documents: ``hidden`` [R, H] predicts ``targets`` (int64[R]); ``owners`` int64[R]: whose
    document's each is."""

    hidden: Tensor
    targets: Tensor
    owners: Tensor


def predictions(model: HiddenModel, documents: Packed) -> Predictions:
    """Computes the hidden states, with gradients where the model is in training."""
    index = prediction_rows(documents.trained, documents.seq_starts)
    hidden = model.hidden(document_batch(documents.ids, documents.seq_starts))
    owners = np.searchsorted(documents.seq_starts, index, side="right") - 1
    rows, targets, owner = (
        torch.from_numpy(array.astype(np.int64)).to(hidden.device)
        for array in (index, documents.ids[index + 1], owners)
    )
    return Predictions(hidden[rows], targets, owner)


def document_logprobs(model: HiddenModel, documents: Packed, *, mean: bool = False) -> Tensor:
    """Log probabilities of the trained tokens of each document, [D]: sums, or means by token."""
    found = predictions(model, documents)
    logprobs = token_logprobs(found.hidden, model.head(), found.targets)
    return answer_logprobs(logprobs, found.owners, len(documents.seq_starts) - 1, mean=mean)


def policy_logprobs(model: HiddenModel, documents: Packed, temperature: float) -> tuple[Tensor, Tensor]:
    """Log probabilities [R] of the trained tokens at a temperature, and whose document's each is, int64[R]."""
    found = predictions(model, documents)
    return token_logprobs(found.hidden / temperature, model.head(), found.targets), found.owners
