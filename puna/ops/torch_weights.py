"""The matrices that TorchOps computes with: plain tensors, encoded ones, and low-rank changes of either.
Their products are torch_linear's.
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
        weight = Weight("encoded", (len(data), self.columns), self.kind, np.from_dlpack(data.cpu()).view(np.uint8))
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
        return changed if w.magnitude is None else changed * dora_factor(w, changed).to(dtype)[:, None]
    if isinstance(w, AdaptedMatrix):
        return dense(w.base, dtype)
    return w.to(dtype)


def dora_factor(w: LowRankMatrix, changed: Tensor) -> Tensor:
    """[rows]: by what rows of the changed matrix are multiplied. Their lengths count as constants (DoRA, §4.3)."""
    assert w.magnitude is not None
    factor: Tensor = w.magnitude / torch.linalg.vector_norm(changed.detach().to(w.magnitude.dtype), dim=1)
    return factor
