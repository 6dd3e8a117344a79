"""What the layouts of quantized matrices share: looking up a module's tensors with their types and shapes checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.safetensors import StoredTensor
from puna.errors import CheckpointError
from puna.tensor import QuantType, Weight
from puna.tensor.groupwise import Grouped, encode_rows, grouped_type, rows_type

FLOATS = ("F32", "F16", "BF16")


Rows = Callable[[slice], NDArray[np.float32]]
Spacing = tuple[NDArray[np.float32], NDArray[np.int16], NDArray[np.intp]]


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix: its shape (outputs, inputs), what tells the type of its weight, and what makes that."""

    shape: tuple[int, int]
    kind: Callable[[], QuantType]
    make: Callable[[str], Weight]

    @classmethod
    def grouped(
        cls, shape: tuple[int, int], bits: int, codes: Callable[[], NDArray[np.uint8]], spacing: Callable[[], Spacing]
    ) -> Matrix:
        """One of whole numbers; what ``codes`` and ``spacing`` (scales, zeros, groups) read is that of ``Grouped``."""
        return cls(
            shape,
            lambda: grouped_type(*spacing(), bits),
            lambda name: Grouped(codes(), *spacing(), bits).as_weight(name),
        )

    @classmethod
    def encoded(cls, shape: tuple[int, int], read: Callable[[], Rows]) -> Matrix:
        """One that no whole numbers stand for, which becomes Q8_0: ``read`` gives what gives some rows of it."""
        return cls(shape, lambda: rows_type(shape[1], "Q8_0"), lambda name: encode_rows(name, shape, "Q8_0", read()))


class Layout(Protocol):
    """How one method stores a matrix. Made of its ``quantization_config``, which it checks."""

    title: str
    """What it is called, with what matters of its numbers, for people."""
    mains: tuple[str, ...]
    """Endings after ``module.`` of the tensor whose presence (of no float type) tells that a module is quantized."""
    beside: tuple[str, ...]
    """Endings of the others; those that computing needs not are ignored."""

    def matrix(self, parts: Parts) -> Matrix:
        """Check the tensors of one module without reading them. Raises CheckpointError."""


@dataclass(frozen=True)
class Parts:
    """The tensors of one module by their endings."""

    source: str
    module: str
    tensors: Mapping[str, StoredTensor]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def need(self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...] | None = None) -> StoredTensor:
        """A tensor of one of these types; None in ``shape`` stands for any size. Raises CheckpointError."""
        if name not in self.tensors:
            raise self.error(name, "is missing, so the matrix cannot be read; the folder is incomplete")
        found = self.tensors[name]
        if found.dtype not in dtypes:
            raise self.error(name, f"has dtype {found.dtype}; expected {' or '.join(dtypes)}")
        if shape is not None and not _fits(found.shape, shape):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(name, f"has shape {found.shape}; expected ({wanted})")
        return found

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {self.module}.{name} {problem}")


class Fields:
    """A ``quantization_config``, whose fields are checked as they are read."""

    def __init__(self, source: str, raw: Mapping[str, Any]) -> None:
        self.source, self.raw = source, raw

    def one_of(self, names: tuple[str, ...], allowed: tuple[Any, ...], default: Any = None) -> Any:
        """The first of these fields that is there. Raises CheckpointError when it is none of ``allowed``."""
        for name in names:
            if name in self.raw:
                value = self.raw[name]
                if not any(type(value) is type(item) and value == item for item in allowed):
                    raise self.error(name, f"is {value!r:.80}; supported: {', '.join(map(repr, allowed))}")
                return value
        if default is None:
            raise self.error(names[0], f"is missing; expected one of {', '.join(map(repr, allowed))}")
        return default

    def group_size(self, names: tuple[str, ...]) -> int:
        """Columns that share a scale, or -1 for a whole row."""
        value = next((self.raw[name] for name in names if name in self.raw), None)
        if type(value) is not int or not (value == -1 or 0 < value < 2**31):
            raise self.error(names[0], f"is {value!r:.80}; expected a number of columns, or -1 for whole rows")
        return value

    def refuse(self, name: str, reason: str) -> None:
        """Raise CheckpointError where the field says something."""
        if self.raw.get(name):
            raise self.error(name, f"is set: {reason}; use another version of the model")

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: quantization_config: {name} {problem}")


def groups_title(group_size: int) -> str:
    """How people call the groups of columns that share a scale."""
    return "rows" if group_size == -1 else f"groups of {group_size}"


def group_count(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-columns // group_size)


def column_groups(parts: Parts, name: str, columns: int, groups: int) -> NDArray[np.intp] | None:
    """The group of each column as ``name`` says (act-order), or None without it. Raises CheckpointError."""
    if name not in parts:
        return None
    order = parts.tensors[name].array().astype(np.intp)
    if columns and not 0 <= order.min() <= order.max() < groups:
        raise parts.error(name, f"names groups {order.min()} to {order.max()}, but there are {groups}")
    return order


def word_bytes(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """int32[..., n] -> their bytes, lowest first: uint8[..., 4 n]."""
    return np.ascontiguousarray(words, "<i4").view(np.uint8)


def floats(tensor: StoredTensor) -> NDArray[np.float32]:
    return tensor.array().astype(np.float32)


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(found) == len(wanted) and all(w is None or f == w for f, w in zip(found, wanted, strict=True))
