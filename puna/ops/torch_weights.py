"""The matrices that TorchOps computes with: plain tensors, encoded ones, and low-rank changes of either.

Sources: Hu et al. 2021 (LoRA), Liu et al. 2024 (DoRA), Dettmers et al. 2023 (QLoRA: adapters over a frozen quantized
base, which is decoded again in the backward pass).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from puna.tensor import Weight
from puna.tensor.types import QuantType

Decode = Callable[[Weight], NDArray[np.float32]]
FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class EncodedMatrix:
    """A frozen matrix [rows, columns] that stays encoded, and is decoded anew each time it is multiplied by.

    ``data`` is uint8[rows, row bytes], which may be memory-mapped.
    """

    kind: QuantType
    data: Tensor
    decoder: Decode

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.data), self.columns

    @property
    def columns(self) -> int:
        return self.data.shape[1] // self.kind.block_bytes * self.kind.block_size

    def decode(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor:
        """All or some rows as numbers."""
        data = self.data if rows is None else self.data[rows]
        if self.kind.name in FLOAT_DTYPES:
            return data.view(FLOAT_DTYPES[self.kind.name]).to(dtype)
        # By DLPack, because numpy() would fix the size of the tensor's memory, which is let go of where it is sharded.
        weight = Weight("encoded", (len(data), self.columns), self.kind, np.from_dlpack(data.cpu()))
        return torch.from_numpy(self.decoder(weight)).to(data.device, dtype)


@dataclass(frozen=True)
class LowRankMatrix:
    """A matrix W under training: W + scale · B · A, with ``a`` [rank, columns] and ``b`` [rows, rank].

    ``dropout`` is the probability with which numbers of the input of A are dropped, 0 where nothing is trained. With a
    ``magnitude`` [rows] it is DoRA: the rows of the sum, scaled to these lengths.
    """

    base: Tensor | EncodedMatrix
    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class AdaptedMatrix:
    """A matrix and the changes that adapters make to it: A, B and scale by the adapters' numbers."""

    base: Tensor | EncodedMatrix
    changes: Sequence[tuple[Tensor, Tensor, float] | None]


Matrix = Tensor | EncodedMatrix | LowRankMatrix | AdaptedMatrix


def as_tensor(array: NDArray[Any]) -> Tensor:
    """Without a copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a mapped file is read-only: nothing writes to it
        return torch.from_numpy(np.ascontiguousarray(array))


def dense(w: Matrix, dtype: torch.dtype) -> Tensor:
    """The matrix in numbers, with gradients towards what is trained of it."""
    if isinstance(w, EncodedMatrix):
        return w.decode(dtype)
    if isinstance(w, LowRankMatrix):
        changed = dense(w.base, dtype) + w.scale * (w.b @ w.a).to(dtype)
        return changed if w.magnitude is None else changed * _dora_factor(w, changed).to(dtype)[:, None]
    if isinstance(w, AdaptedMatrix):
        return dense(w.base, dtype)
    return w.to(dtype)


def multiply(x: Tensor, w: Matrix) -> Tensor:
    """x · Wᵀ, with the change where one is under training."""
    if isinstance(w, EncodedMatrix):
        product: Tensor = _EncodedProduct.apply(x, w)  # type: ignore[no-untyped-call]
        return product
    if isinstance(w, AdaptedMatrix):
        return multiply(x, w.base)
    if isinstance(w, LowRankMatrix):
        dropped = F.dropout(x, w.dropout) if w.dropout else x
        y, reduced = multiply(x, w.base), w.scale * F.linear(dropped, w.a.to(x.dtype))
        if w.magnitude is None:
            return torch.addmm(y, reduced, w.b.to(x.dtype).T)
        change = F.linear(reduced, w.b.to(x.dtype))
        factor = _dora_factor(w, dense(w.base, x.dtype).detach() + w.scale * (w.b @ w.a).to(x.dtype)).to(x.dtype)
        # As in PEFT, dropout falls on all that DoRA adds, the rescaling of W's part included.
        return y + (factor - 1) * (multiply(dropped, w.base) if w.dropout else y) + factor * change
    return F.linear(x, w.to(x.dtype))


def low_rank_product(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · (x · Aᵀ) · Bᵀ."""
    return F.linear(scale * F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def _dora_factor(w: LowRankMatrix, changed: Tensor) -> Tensor:
    """[rows]: by what rows of the changed matrix are multiplied. Their lengths count as constants (DoRA, §4.3)."""
    assert w.magnitude is not None
    factor: Tensor = w.magnitude / torch.linalg.vector_norm(changed.detach().to(w.magnitude.dtype), dim=1)
    return factor


class _EncodedProduct(torch.autograd.Function):
    """x · Wᵀ of a frozen matrix: nothing is kept for the backward pass but the encoded bytes, which were there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: EncodedMatrix) -> Tensor:
        ctx.w = w
        return F.linear(x, w.decode(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ ctx.w.decode(gradient.dtype), None
