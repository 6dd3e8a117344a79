"""Objectives beyond the next token: preferences between pairs of answers, by any of the losses of preferences.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puna.ops.torch_ops import document_batch
from puna.train.losses import prediction_rows, token_logprobs
from puna.train.module import LlamaModule
from puna.train.preferences import answer_logprobs


@dataclass(frozen=True)
class Pairs:
    """Documents in one sequence, as a Pack: document 2i is the chosen answer behind its prompt, 2i + 1 the rejected.

    ``reference`` is float[D]: each answer's log probability under the reference (``document_logprobs``).
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    seq_starts: NDArray[np.int32]
    reference: NDArray[np.floating]


@dataclass(frozen=True)
class PairedPreference:
    """The mean over pairs of ``loss(chosen, rejected, reference chosen, reference rejected)``.

    ``mean``: log probabilities are means by token (IPO), not sums (DPO).
    """

    pair_loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    mean: bool = False

    def count(self, micro_batch: Pairs) -> int:
        return (len(micro_batch.seq_starts) - 1) // 2

    def loss(self, module: LlamaModule, micro_batch: Pairs, total: int) -> Tensor:
        found = document_logprobs(module, micro_batch.ids, micro_batch.trained, micro_batch.seq_starts, mean=self.mean)
        reference = torch.from_numpy(micro_batch.reference).to(found)
        return self.pair_loss(found[::2], found[1::2], reference[::2], reference[1::2]).sum() / max(total, 1)


def document_logprobs(
    module: LlamaModule,
    ids: NDArray[np.int32],
    trained: NDArray[np.bool_],
    seq_starts: NDArray[np.int32],
    *,
    mean: bool = False,
) -> Tensor:
    """Log probabilities of the trained tokens of each document, [D]: sums, or means by token."""
    index = prediction_rows(trained, seq_starts)
    device = module.ops.device
    targets = torch.from_numpy(ids[index + 1].astype(np.int64)).to(device)
    hidden = module.hidden(document_batch(ids, seq_starts))[torch.from_numpy(index).to(device)]
    owners = torch.from_numpy(np.searchsorted(seq_starts, index, side="right") - 1).to(device)
    return answer_logprobs(token_logprobs(hidden, module.head(), targets), owners, len(seq_starts) - 1, mean=mean)
