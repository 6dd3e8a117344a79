"""Causal attention as plain products, with its gradients: for bfloat16 on a CPU.

torch's own kernel multiplies small tiles one by one, and in documents shorter than its tiles computes what causality
hides. On documents of 16 to 512 tokens whole products over blocks of queries take from a sixth to three quarters of its
time, on longer ones about the same (docs/training-speed.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from puna.ops.torch_functions import causal_softmax, causal_softmax_backward

_QUERIES = 128  # positions in a block: more compute more of what causality hides, fewer make smaller products
_KEPT = 512  # length of the longest documents whose weights are kept: a few hundred numbers for a token and head
_NUMBERS = 1 << 22  # of weights at a time, so that memory does not grow with the documents


class CausalAttention(torch.autograd.Function):
    """q [documents, length, heads, d], k and v [documents, length, key heads, d] -> as q.

    Scores are float32 at least, of a block of queries at a time. Weights are kept for the backward pass where documents
    are short, else computed again there.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.documents, key_heads = len(q), k.shape[2]
        q, k, v = _by_key_head(q, key_heads), _by_key_head(k, key_heads)[:, :, 0], _by_key_head(v, key_heads)[:, :, 0]
        out, wide_k, kept = torch.empty_like(q), k.to(_wide(k)), []
        for part, rows, seen in _blocks(q):
            weights = _weights(q[part, rows], wide_k[part, seen])
            out[part, rows] = torch.bmm(weights.flatten(1, 2), v[part, seen]).view(out[part, rows].shape)
            if q.shape[1] <= _KEPT:
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        return _by_position(out, ctx.documents)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, v, *kept = ctx.saved_tensors
        wide = _wide(q)
        gradient = _by_key_head(gradient, len(k) // ctx.documents)
        wide_k, q_gradient = k.to(wide), torch.empty_like(q)
        k_gradient, v_gradient = torch.zeros_like(wide_k), torch.zeros_like(wide_k)
        for number, (part, rows, seen) in enumerate(_blocks(q)):
            queries, out_gradient = q[part, rows], gradient[part, rows].flatten(1, 2)
            weights = kept[number] if kept else _weights(queries, wide_k[part, seen])
            v_gradient[part, seen] += torch.bmm(weights.flatten(1, 2).mT, out_gradient)
            weights_gradient = torch.bmm(out_gradient, v[part, seen].mT).view(weights.shape)
            scores_gradient = causal_softmax_backward(weights, weights_gradient, q.shape[-1] ** -0.5).flatten(1, 2)
            q_gradient[part, rows] = torch.bmm(scores_gradient, k[part, seen]).view(queries.shape)
            k_gradient[part, seen] += torch.bmm(scores_gradient.mT, queries.flatten(1, 2))
        gradients = (q_gradient, k_gradient.to(k.dtype)[:, :, None], v_gradient.to(v.dtype)[:, :, None])
        return tuple(_by_position(x, ctx.documents) for x in gradients)


def kept_weights(length: int) -> float:
    """At most how many weights of a token and head are kept for the backward pass, where no document is longer."""
    return (min(length, _KEPT) + _QUERIES) / 2


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_key_head(x: Tensor, key_heads: int) -> Tensor:
    """[documents, length, heads, d] -> [documents · key heads, length, heads of each, d]."""
    documents, length, heads, size = x.shape
    parts = x.reshape(documents, length, key_heads, heads // key_heads, size)
    return parts.transpose(1, 2).reshape(documents * key_heads, length, heads // key_heads, size)


def _by_position(x: Tensor, documents: int) -> Tensor:
    """The way back."""
    _, length, heads, size = x.shape
    parts = x.view(documents, -1, length, heads, size)
    return parts.transpose(1, 2).reshape(documents, length, -1, size)


def _blocks(q: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """What is computed at a time of q by key heads: which of these, the queries' positions, and the keys' they see."""
    count, length, heads, _ = q.shape
    for start in range(0, length, _QUERIES):
        end = min(start + _QUERIES, length)
        at_once = max(1, _NUMBERS // ((end - start) * heads * end))
        for first in range(0, count, at_once):
            yield slice(first, first + at_once), slice(start, end), slice(0, end)


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    """[n, queries, heads, keys] of queries [n, queries, heads, d], the last of which is at the last key's position."""
    n, count, heads, size = queries.shape
    scores = torch.bmm(queries.flatten(1, 2).to(keys.dtype), keys.mT).view(n, count, heads, -1)
    return causal_softmax(scores, size**-0.5, queries.dtype)
