"""Steps of the forward pass with backward passes of their own, which keep less and pass over memory less often."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Angles = tuple[Tensor, Tensor]


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) · weight by row, in float32 at least. Kept are x and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, weight.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        x_gradient = weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (x * inverse).mul_(gradient).sum(0)
        if ctx.needs_input_grad[0]:
            # y = x · i(x) with i = (mean(x²) + eps)^-½, so dx = i · g - x · i³ · mean(g · x).
            scaled = gradient * weight
            inner = (scaled * x).mean(-1, keepdim=True) * inverse.square()
            x_gradient = scaled.addcmul_(x.to(scaled.dtype), inner, value=-1).mul_(inverse).to(x.dtype)
        return x_gradient, weight_gradient, None


class Rotate(torch.autograd.Function):
    """Every head [T, heads, d] turned by angles (cosines and sines, [T, d / 2]); nothing but these is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(x, cosines, sines)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        cosines, sines = ctx.saved_tensors
        return _rotated(gradient, cosines, -sines), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up, computed again in the backward pass rather than kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        up_gradient = F.silu(gate).mul_(gradient)
        gate_gradient = torch.ops.aten.silu_backward(gradient * up, gate)
        return gate_gradient, up_gradient


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """In the half-split layout (Su et al. 2021), x [T, heads · d] of any dtype, computed in that of the angles."""
    pairs = x.reshape(len(x), -1, 2, cosines.shape[-1])
    cosines, sines = cosines[:, None], sines[:, None]
    first, second = pairs.to(cosines.dtype).unbind(2)
    out = torch.empty(pairs.shape, dtype=cosines.dtype, device=x.device)
    torch.mul(first, cosines, out=out[:, :, 0]).addcmul_(second, sines, value=-1)
    torch.mul(second, cosines, out=out[:, :, 1]).addcmul_(first, sines)
    return out.view(x.shape).to(x.dtype)
