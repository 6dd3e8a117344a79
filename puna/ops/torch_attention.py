"""Causal attention within whole documents that are packed in one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from puna.ops.torch_causal import CausalAttention


def attend_within(q: Tensor, k: Tensor, v: Tensor, head_dim: int, seq_starts: bytes) -> Tensor:
    """q [T, H · d], k and v [T, G · d] -> [T, H · d]; ``seq_starts`` are the bytes of int32[documents + 1].

    Documents of about one length are computed together, padded at their ends, where causal attention is blind. That
    costs the squares of the documents' lengths; a mask over the whole batch costs that of their sum.
    """
    groups = _groups(seq_starts, q.device)
    outs = []
    for group, *parts in zip(groups.by_length, *(_grouped(x, groups) for x in (q, k, v)), strict=True):
        queries, keys, values = (x.view(group.documents, group.length, -1, head_dim) for x in parts)
        outs.append(_causal(queries, keys, values).reshape(group.documents * group.length, -1))
    if groups.place is None:
        return outs[0]
    packed: Tensor = _Packed.apply(groups, *outs)  # type: ignore[no-untyped-call]
    return packed


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [documents, length, heads, d], k and v [documents, length, key heads, d] -> as q."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        out: Tensor = CausalAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
        return out
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


@dataclass(frozen=True)
class _Group:
    """Documents of about one length, padded to it: their tokens, int64[documents · length], any for the padding.

    ``padding``: which of these are padding, int64.
    """

    documents: int
    length: int
    tokens: Tensor
    padding: Tensor


@dataclass(frozen=True)
class _Groups:
    """``place``: where each token of the batch comes to lie in the groups' concatenation.

    None: the batch is the only group, as it lies.
    """

    by_length: Sequence[_Group]
    place: Tensor | None


@lru_cache(maxsize=8)  # every layer of a step asks for the same
def _groups(seq_starts: bytes, device: torch.device) -> _Groups:
    starts = np.frombuffer(seq_starts, np.int32).astype(np.int64)
    lengths = np.diff(starts)
    padded = np.array([_padded_length(int(length)) for length in lengths])
    place = np.empty(starts[-1], np.int64)
    by_length, at = [], 0
    for target in np.unique(padded):
        chosen = np.flatnonzero(padded == target)
        length = lengths[chosen].max()
        offsets = np.arange(length)
        inside = offsets < lengths[chosen, None]
        tokens = np.where(inside, starts[chosen, None] + offsets, starts[chosen, None])
        place[tokens[inside]] = at + np.flatnonzero(inside)
        at += tokens.size
        indices = (torch.from_numpy(index).to(device) for index in (tokens.reshape(-1), np.flatnonzero(~inside)))
        by_length.append(_Group(len(chosen), int(length), *indices))
    unmoved = len(by_length) == 1 and np.array_equal(place, np.arange(at))
    return _Groups(by_length, None if unmoved else torch.from_numpy(place).to(device))


def _padded_length(length: int) -> int:
    """The next of 16, 20, 24, 28, 32, 40, 48, …: at most a fifth of a longer document is padding."""
    step = max(4, 1 << (length - 1).bit_length() >> 3)
    return max(16, -(-length // step) * step)


def _grouped(x: Tensor, groups: _Groups) -> Sequence[Tensor]:
    if groups.place is None:
        return (x,)
    found: tuple[Tensor, ...] = _Grouped.apply(groups, x)  # type: ignore[no-untyped-call]
    return found


class _Grouped(torch.autograd.Function):
    """[T, n] to the groups' [documents · length, n]. The gradients of padding, which nothing reads, are passed over."""

    @staticmethod
    def forward(ctx: Any, groups: _Groups, x: Tensor) -> tuple[Tensor, ...]:
        ctx.groups = groups
        return tuple(x[group.tokens] for group in groups.by_length)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, torch.cat(gradients)[ctx.groups.place]


class _Packed(torch.autograd.Function):
    """The way back. The gradients of padding are 0."""

    @staticmethod
    def forward(ctx: Any, groups: _Groups, *xs: Tensor) -> Tensor:
        ctx.groups = groups
        return torch.cat(xs)[groups.place]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        groups = ctx.groups.by_length
        return None, *(gradient[group.tokens].index_fill_(0, group.padding, 0) for group in groups)
