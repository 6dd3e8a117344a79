"""The frozen matrices of QLoRA: floats kept in memory as a quantized type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from puna.tensor import QUANT_TYPES, Weight
from puna.train.recipe import Method

BASE_TYPES = ("Q4_K", "Q4_0", "Q8_0")  # the first that rows of a matrix are whole blocks of


def as_quantized(method: Method, weight: Weight) -> str | None:
    """The type in which a layer's matrix of floats is kept; None for what stays as it is."""
    inside = len(weight.shape) == 2 and weight.name.startswith("model.layers.")
    if method.type != "qlora" or not inside or weight.type.block_size > 1:
        return None
    wanted = BASE_TYPES if method.base_type is None else (method.base_type.upper(),)
    return next((name for name in wanted if weight.shape[1] % QUANT_TYPES[name].block_size == 0), None)


class QuantizedBase(Mapping[str, Weight]):
    """A model's tensors, the layers' matrices of floats in ``method``'s type; each is made when it is asked for."""

    def __init__(self, tensors: Mapping[str, Weight], method: Method) -> None:
        self._tensors, self._method = tensors, method

    def __getitem__(self, name: str) -> Weight:
        weight = self._tensors[name]
        kind = as_quantized(self._method, weight)
        return weight if kind is None else Weight.from_array(name, weight.dequantize(), kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
