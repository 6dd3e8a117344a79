"""Steps of the forward pass with backward passes of their own, which keep less and pass over memory less often.

Each is written in torch, for every device and dtype; where there are native kernels for the numbers, these do it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from puna.ops.torch_native import array, training_kernels

Angles = tuple[Tensor, Tensor]


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) · weight by row, in float32 at least. Kept are x and a number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if weight.dtype == torch.float32 and (kernels := training_kernels(x)):
            out, inverse = x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.float32)
            kernels.norm(array(x), array(weight), eps, array(out), array(inverse))
            ctx.save_for_backward(x, weight, inverse[:, None])
            return out
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
            if weight.dtype == torch.float32 and (kernels := training_kernels(x)):
                x_gradient = x.new_empty(x.shape)
                factors = array(weight), array(inverse[:, 0])
                kernels.norm_backward(array(x), *factors, array(gradient), array(x_gradient))
                return x_gradient, weight_gradient, None
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
        return _rotated(gradient, cosines, sines, back=True), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up, computed again in the backward pass rather than kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if kernels := training_kernels(gate):
            out = gate.new_empty(gate.shape)
            kernels.gate(array(gate), array(up), array(out))
            return out
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        if kernels := training_kernels(gate):
            found = gate.new_empty(gate.shape), up.new_empty(up.shape)
            kernels.gate_backward(array(gate), array(up), array(gradient), *map(array, found))
            return found
        up_gradient = F.silu(gate).mul_(gradient)
        gate_gradient = torch.ops.aten.silu_backward(gradient * up, gate)
        return gate_gradient, up_gradient


def causal_softmax(scores: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """softmax(scale · scores) over the keys that are visible, 0 for the others, in ``dtype``.

    ``scores`` [n, queries, heads, keys] may be overwritten; the last query is at the last key's position.
    """
    weights = scores.new_empty(scores.shape, dtype=dtype)
    if scores.dtype == torch.float32 and (kernels := training_kernels(weights)):
        kernels.causal_softmax(array(scores), scale, array(weights))
        return weights
    count = scores.shape[1]
    hidden = torch.full((count, count), float("-inf"), dtype=scores.dtype, device=scores.device).triu_(1)
    scores[..., -count:] += hidden[:, None]
    return torch.softmax(scores.mul_(scale), -1).to(dtype)


def causal_softmax_backward(weights: Tensor, gradient: Tensor, scale: float) -> Tensor:
    """The gradient of the scores, from that of the weights, which may be overwritten."""
    if kernels := training_kernels(weights):
        kernels.softmax_backward(array(weights.flatten(0, -2)), scale, array(gradient.view(-1, weights.shape[-1])))
        return gradient
    wide = torch.promote_types(weights.dtype, torch.float32)
    found: Tensor = torch.ops.aten._softmax_backward_data(gradient.to(wide), weights.to(wide), -1, wide)
    return found.mul_(scale).to(weights.dtype)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> Tensor:
    """In the half-split layout (Su et al. 2021), x [T, heads · d] of any dtype, computed in that of the angles."""
    if cosines.dtype == torch.float32 and (kernels := training_kernels(x)):
        turned = x.new_empty(x.shape)
        kernels.rotate(array(x), array(cosines), array(sines), back, array(turned))
        return turned
    pairs = x.reshape(len(x), -1, 2, cosines.shape[-1])
    cosines, sines = cosines[:, None], (-sines if back else sines)[:, None]
    first, second = pairs.to(cosines.dtype).unbind(2)
    out = torch.empty(pairs.shape, dtype=cosines.dtype, device=x.device)
    torch.mul(first, cosines, out=out[:, :, 0]).addcmul_(second, sines, value=-1)
    torch.mul(second, cosines, out=out[:, :, 1]).addcmul_(first, sines)
    return out.view(x.shape).to(x.dtype)
