"""Low-rank changes of matrices (LoRA, Hu et al. 2021), and the adapter that is a set of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LowRank:
    """A change of a matrix W of shape (outputs, inputs): W + scale · B · A.

    ``a`` is float32[rank, inputs] and ``b`` float32[outputs, rank], the names of the paper.
    """

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    scale: float

    def __post_init__(self) -> None:
        assert self.a.ndim == self.b.ndim == 2
        assert self.a.shape[0] == self.b.shape[1] > 0

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Adapter:
    """The changes of one model's matrices, by their Hugging Face names (``model.layers.0.mlp.up_proj.weight``).

    ``magnitudes``, float32[outputs] by the same names, are of DoRA (Liu et al. 2024): the lengths that the rows of the
    changed matrix are scaled to. That is no low-rank change any more: such an adapter can only be merged.
    """

    changes: Mapping[str, LowRank]
    magnitudes: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest of its ranks."""
        return max(change.rank for change in self.changes.values())

    @property
    def nbytes(self) -> int:
        """The memory that it takes, here or loaded into a model."""
        return sum(change.a.nbytes + change.b.nbytes for change in self.changes.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hexadecimal of all that a result depends on, whatever file it came from."""
        digest = hashlib.sha256()
        for name, change in sorted(self.changes.items()):
            digest.update(f"{name} {change.a.shape} {change.b.shape} {float(change.scale).hex()}\n".encode())
            magnitude = (self.magnitudes[name],) if name in self.magnitudes else ()
            for matrix in (change.a, change.b, *magnitude):
                digest.update(np.ascontiguousarray(matrix, "<f4").data)
        return digest.hexdigest()
