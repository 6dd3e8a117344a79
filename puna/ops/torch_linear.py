"""Products with the matrices of torch_weights, and their gradients.

Sources: Hu et al. 2021 (LoRA), Liu et al. 2024 (DoRA), Dettmers et al. 2023 (QLoRA: adapters over a frozen quantized
base, which is decoded again in the backward pass).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from puna.ops.torch_weights import AdaptedMatrix, EncodedMatrix, LowRankMatrix, Matrix, dense, dora_factor


def multiply(x: Tensor, weights: Sequence[Matrix], residual: Tensor | None = None) -> list[Tensor]:
    """x · Wᵀ of each matrix, with the change where one is under training; the ``residual`` is added to each."""
    weights = [w.base if isinstance(w, AdaptedMatrix) else w for w in weights]
    if any(isinstance(w, LowRankMatrix) and (w.dropout or w.magnitude is not None) for w in weights):
        products = [_changed(x, w) if isinstance(w, LowRankMatrix) else _products(x, [w])[0] for w in weights]
        return products if residual is None else [y + residual for y in products]
    return _products(x, weights, residual)


def low_rank_product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · (x · Aᵀ) · Bᵀ."""
    return F.linear(scale * F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def _changed(x: Tensor, w: LowRankMatrix) -> Tensor:
    """With dropout or as DoRA."""
    dropped = F.dropout(x, w.dropout) if w.dropout else x
    (y,), change = _products(x, [w.base]), low_rank_product(dropped, w.a, w.b, w.scale)
    if w.magnitude is None:
        return y + change
    factor = dora_factor(w, dense(w.base, x.dtype).detach() + w.scale * (w.b @ w.a).to(x.dtype)).to(x.dtype)
    # As in PEFT, dropout falls on all that DoRA adds, the rescaling of W's part included.
    return y + (factor - 1) * (_products(dropped, [w.base])[0] if w.dropout else y) + factor * change


@dataclass(frozen=True)
class _Part:
    """What is no parameter of one matrix: its encoded form, and the scale of its low-rank change, 0 without one."""

    encoded: EncodedMatrix | None
    scale: float


def _products(x: Tensor, weights: Sequence[Matrix], residual: Tensor | None = None) -> list[Tensor]:
    parts, parameters = [], []
    for w in weights:
        base, a, b, scale = (w.base, w.a, w.b, w.scale) if isinstance(w, LowRankMatrix) else (w, None, None, 0.0)
        encoded = base if isinstance(base, EncodedMatrix) else None
        parts.append(_Part(encoded, scale))
        parameters += [None if encoded else base, a, b]
    found: tuple[Tensor, ...] = _Products.apply(x, residual, parts, *parameters)  # type: ignore[no-untyped-call]
    return list(found)


class _Products(torch.autograd.Function):
    """x · (W + scale · B · A)ᵀ + residual of several matrices.

    W + scale · B · A is never made. Encoded matrices, and those of another dtype, are decoded again in the backward
    pass. All that is kept beside the parameters is x, where it is needed, and x · Aᵀ, of all matrices together.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, parts: list[_Part], *parameters: Tensor | None) -> Any:
        bases, downs, ups = parameters[::3], parameters[1::3], parameters[2::3]
        ups = tuple(None if up is None else up.to(x.dtype) for up in ups)
        reduced = None
        if (down := _stacked(downs, x.dtype)) is not None:
            reduced = times(x, down)
        outs, at = [], 0
        for part, base, up in zip(parts, bases, ups, strict=True):
            matrix = _numbers(part, base, x.dtype)
            y = times(x, matrix)
            if residual is not None:
                y += residual
            if up is not None and reduced is not None:
                rank = up.shape[1]
                y.addmm_(reduced[:, at : at + rank], up.T, alpha=part.scale)
                at += rank
            outs.append(y)
        needed = ctx.needs_input_grad[3:]
        keeps_x = any(needed[0::3]) or any(needed[1::3])
        ctx.parts, ctx.dtype = parts, x.dtype
        ctx.ranks = [0 if a is None else len(a) for a in downs]
        kept_reduced = reduced if any(needed[2::3]) else None
        ctx.save_for_backward(x if keeps_x else None, kept_reduced, down, *bases, *ups)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, reduced, down, *matrices = ctx.saved_tensors
        bases, ups = matrices[: len(ctx.parts)], matrices[len(ctx.parts) :]
        wide = torch.promote_types(ctx.dtype, torch.float32)
        x_gradient: Tensor | None = None
        found: list[Tensor | None] = [None] * (3 * len(ctx.parts))
        reduced_gradients, at = [], 0
        for i, (gradient, part, base, up) in enumerate(zip(gradients, ctx.parts, bases, ups, strict=True)):
            if ctx.needs_input_grad[0]:
                matrix = _numbers(part, base, ctx.dtype)
                part_gradient = times(gradient, matrix.T)
                x_gradient = part_gradient if x_gradient is None else x_gradient.add_(part_gradient)
            if ctx.needs_input_grad[3 + 3 * i]:
                found[3 * i] = (gradient.T @ x).to(base.dtype)
            if up is None:
                continue
            rank = ctx.ranks[i]
            reduced_gradients.append(part.scale * times(gradient, up.T))
            if ctx.needs_input_grad[5 + 3 * i]:
                found[3 * i + 2] = (gradient.T @ reduced[:, at : at + rank]).to(wide).mul_(part.scale)
            at += rank
        if down is not None:
            reduced_gradient = torch.cat(reduced_gradients, 1)
            if x_gradient is not None:
                x_gradient.addmm_(reduced_gradient, down)
            if x is not None:
                found[1::3] = _split(reduced_gradient.T @ x, ctx.ranks)
        residual_gradient = None
        if ctx.needs_input_grad[1]:
            residual_gradient = gradients[0] if len(gradients) == 1 else sum(gradients)
        return x_gradient, residual_gradient, None, *found


_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def times(x: Tensor, matrix: Tensor, out: Tensor | None = None) -> Tensor:
    """x · matrixᵀ, without gradients, in ``out`` where the operator can write there.

    torch gives float32 to MKL, which leaves a tenth of an AMD processor unused, and a third in the shape of a head,
    where oneDNN does not.
    """
    if _ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
        return product
    return torch.mm(x, matrix.T, out=out)


def _numbers(part: _Part, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    if part.encoded is not None:
        return part.encoded.decode(dtype)
    assert base is not None
    return base.to(dtype)


def _stacked(downs: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor | None:
    """All A, [ranks, columns]: one product is faster than one for each."""
    there = [a for a in downs if a is not None]
    return torch.cat(there).to(dtype) if there else None


def _split(stacked: Tensor, ranks: Sequence[int]) -> list[Tensor | None]:
    """The gradients of all A, None where there is none."""
    return [part if len(part) else None for part in torch.split(stacked, list(ranks))]
