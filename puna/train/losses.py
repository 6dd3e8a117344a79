"""Losses of next tokens: exact, normalised by tokens, and never with the whole matrix of logits in memory.

R rows (places where a token is predicted), V vocabulary, D hidden size. Losses are sums over rows of weight · loss; a
weight is usually 1 / the trained tokens of the whole step, so that sums over any split of the step add up to the mean
per token. Everything from the logits on is float32, float64 for float64 hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from puna.ops.torch_linear import times
from puna.ops.torch_native import array, training_kernels

CHUNK_BYTES = 64 << 20  # of logits at once
_CACHED_NUMBERS = 1 << 19  # 2 MB


def prediction_rows(trained: NDArray[np.bool_], seq_starts: NDArray[np.integer]) -> NDArray[np.int64]:
    """The tokens whose successors are to be predicted: int64[R].

    ``trained`` is bool[T]: which tokens are targets. A document's first token never is: nothing is before it.
    """
    targets = trained.copy()
    targets[np.asarray(seq_starts[:-1])] = False
    return np.flatnonzero(targets) - 1


def cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The sum over rows of weight · -log softmax(hidden · headᵀ)[target]: a scalar.

    ``hidden`` [R, D], ``head`` [V, D], ``targets`` int64[R], ``weights`` [R]. The gradients are made along with the
    loss, a chunk of rows at a time.
    """
    needed = (torch.is_grad_enabled() and hidden.requires_grad, torch.is_grad_enabled() and head.requires_grad)
    loss: Tensor = _CrossEntropy.apply(hidden, head, targets, weights, needed)  # type: ignore[no-untyped-call]
    return loss


def token_logprobs(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden · headᵀ)[target] of each row: [R]. The logits are computed again in the backward pass."""

    def of_chunk(logits: Tensor, chunk: slice) -> Tensor:
        return torch.log_softmax(logits, -1).gather(1, targets[chunk, None])[:, 0]

    return by_chunks(hidden, head, of_chunk)


def by_chunks(hidden: Tensor, head: Tensor, of_chunk: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """Any function of rows of logits, [rows, V] -> [rows, …], by chunks that the backward pass computes again."""

    def compute(rows: Tensor, head: Tensor, chunk: slice) -> Tensor:
        return of_chunk(_wide(F.linear(rows, head)), chunk)

    parts = [
        checkpoint(compute, hidden[chunk], head, chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in _chunks(len(hidden), len(head))
    ]
    return torch.cat(parts) if parts else of_chunk(_wide(F.linear(hidden, head)), slice(0, 0))


def forward_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each row, times temperature² (Hinton et al. 2015): [R, V], [R, V] -> [R]."""
    student, teacher = (torch.log_softmax(_wide(x) / temperature, -1) for x in (logits, teacher_logits))
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) of each row, times temperature² (Gu et al. 2023): [R, V], [R, V] -> [R]."""
    return forward_kl(teacher_logits, logits, temperature)


def top_k_forward_kl(logits: Tensor, top_ids: Tensor, top_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """As forward_kl, for a teacher of whom the k largest logits of each row are known: [R, V], [R, k], [R, k] -> [R].

    The teacher's distribution is renormalised over these; the student's is over the whole vocabulary.
    """
    student = torch.log_softmax(_wide(logits) / temperature, -1).gather(1, top_ids)
    teacher = torch.log_softmax(_wide(top_logits) / temperature, -1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chunks(rows: int, columns: int, number_bytes: int = 4) -> Iterator[slice]:
    step = _rows_at_once(rows, columns, number_bytes)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _rows_at_once(rows: int, columns: int, number_bytes: int) -> int:
    return max(1, min(rows, CHUNK_BYTES // (columns * number_bytes)))


def _to_gradients(logits: Tensor, targets: Tensor, weights: Tensor, gradients: bool) -> Tensor:
    """The loss of some rows, [R, V] and [R]; their logits become weight · (softmax - one-hot of the target) if asked.

    So few rows at a time that they stay in the processor's cache from the first pass over them to the last.
    """
    if weights.dtype == torch.float32 and (kernels := training_kernels(logits)):
        losses = torch.empty_like(weights)
        kernels.cross_entropy(array(logits), array(targets), array(weights), gradients, array(losses))
        return losses.sum()
    loss = torch.zeros((), dtype=weights.dtype, device=logits.device)
    step = max(1, _CACHED_NUMBERS // logits.shape[1])
    for start in range(0, len(logits), step):
        chunk = slice(start, start + step)
        ids, weight = targets[chunk, None], weights[chunk, None]
        logprobs = torch.log_softmax(logits[chunk], -1, dtype=weights.dtype)
        loss -= (weight * logprobs.gather(1, ids)).sum()
        if gradients:
            probabilities = logprobs.exp_()
            probabilities.scatter_add_(1, ids, torch.full_like(weight, -1))
            torch.mul(probabilities, weight, out=logits[chunk])
    return loss


class _CrossEntropy(torch.autograd.Function):
    """d loss / d logits = weight · (softmax - one-hot of the target)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, needed: tuple[bool, bool]
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if needed[0] else None
        head_gradient = torch.zeros_like(head, dtype=dtype) if needed[1] else None
        # One buffer for all chunks: fresh memory costs more than the arithmetic does.
        size = len(hidden), len(head), hidden.element_size()
        buffer = hidden.new_empty(_rows_at_once(*size), len(head))
        for chunk in _chunks(*size):
            rows = hidden[chunk]
            logits = times(rows, head, buffer[: len(rows)])
            loss += _to_gradients(logits, targets[chunk], weights[chunk].to(dtype), any(needed))
            if hidden_gradient is not None:
                hidden_gradient[chunk] = times(logits, head.T)
            if head_gradient is None:
                continue
            if head_gradient.dtype == rows.dtype:
                head_gradient.addmm_(logits.T, rows)
            else:
                head_gradient += logits.T @ rows
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.head_dtype = head.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        hidden_gradient, head_gradient = ctx.saved_tensors
        if gradient.device.type != "cpu" or gradient != 1:  # usually it is 1, which saves a copy
            hidden_gradient, head_gradient = (
                None if g is None else g * gradient.to(g.dtype) for g in (hidden_gradient, head_gradient)
            )
        if head_gradient is not None:
            head_gradient = head_gradient.to(ctx.head_dtype)
        return hidden_gradient, head_gradient, None, None, None
