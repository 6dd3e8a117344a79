"""The weights of a Hugging Face folder, quantized or not, made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from puna.checkpoint.hf_quantized.awq import AwqLayout
from puna.checkpoint.hf_quantized.bitsandbytes import BitsAndBytesLayout
from puna.checkpoint.hf_quantized.compressed_tensors import ByteLayout, CompressedTensorsLayout
from puna.checkpoint.hf_quantized.gptq import GptqLayout
from puna.checkpoint.hf_quantized.layout import Fields, Layout, Matrix, Parts
from puna.checkpoint.safetensors import StoredTensor
from puna.errors import CheckpointError
from puna.tensor import DeferredWeight, QuantType, Weight

LAYOUTS: dict[str, Callable[[Fields], Layout]] = {
    "gptq": GptqLayout,
    "awq": AwqLayout,
    "compressed-tensors": CompressedTensorsLayout,
    "bitsandbytes": BitsAndBytesLayout,
    "fp8": ByteLayout,
    "fbgemm_fp8": ByteLayout,
}
# Scales of a rounded KV cache and of attention: not needed, for the cache here has a type of its own.
_CACHE_SCALES = tuple(f".{which}_{what}" for which in "qkv" for what in ("scale", "zero_point", "proj.output_scale"))


class QuantizedWeights(Mapping[str, Weight]):
    """Weights by name, each made anew whenever its data are asked for; what they are is known without.

    ``title`` says how they are quantized, for people.
    """

    def __init__(self, title: str, floats: Mapping[str, StoredTensor], matrices: Mapping[str, Matrix]) -> None:
        self.title, self._floats, self._matrices = title, floats, matrices
        self._kinds: dict[str, QuantType] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        matrices = {name: matrix.shape for name, matrix in self._matrices.items()}
        return {name: tensor.weight().shape for name, tensor in self._floats.items()} | matrices

    def __getitem__(self, name: str) -> Weight:
        if name in self._floats:
            return self._floats[name].weight()
        matrix = self._matrices[name]
        if name not in self._kinds:
            self._kinds[name] = matrix.kind()
        return DeferredWeight(name, matrix.shape, self._kinds[name], lambda: matrix.make(name).data)

    def __contains__(self, name: object) -> bool:
        return name in self._floats or name in self._matrices

    def __iter__(self) -> Iterator[str]:
        yield from self._floats
        yield from self._matrices

    def __len__(self) -> int:
        return len(self._floats) + len(self._matrices)


def read_quantized(
    source: str, quantization: Any, stored: Mapping[str, StoredTensor], biases: bool
) -> QuantizedWeights:
    """The weights of a folder whose ``quantization_config`` is given; ``source`` is the file that it is in.

    Where the model has no ``biases``, those that are all 0 are left out, for some makers write them.
    Raises CheckpointError for a method that is unknown, and for tensors that are missing or of the wrong type or shape.
    """
    layout = _layout(source, quantization)
    modules = _modules(layout, stored)
    endings = {f"{module}.{ending}" for module in modules for ending in (*layout.mains, *layout.beside)}
    floats = {
        name: tensor
        for name, tensor in stored.items()
        if not (name in endings or name.endswith(_CACHE_SCALES) or (not biases and _is_zero_bias(name, tensor)))
    }
    matrices = {}
    for module in modules:
        found = {e: stored[f"{module}.{e}"] for e in (*layout.mains, *layout.beside) if f"{module}.{e}" in stored}
        parts = Parts(next(iter(found.values())).source, module, found)
        matrices[f"{module}.weight"] = layout.matrix(parts)
    return QuantizedWeights(layout.title, floats, matrices)


def _layout(source: str, quantization: Any) -> Layout:
    if not isinstance(quantization, dict):
        raise CheckpointError(f"{source}: quantization_config must be an object, found {quantization!r:.80}")
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in LAYOUTS:
        raise CheckpointError(
            f"{source}: the weights are quantized by the method {method!r:.80}, which is not supported; supported: "
            f"{', '.join(LAYOUTS)}. Use another version of the model, or a .gguf file"
        )
    return LAYOUTS[method](Fields(source, quantization))


def _modules(layout: Layout, stored: Mapping[str, StoredTensor]) -> list[str]:
    """The modules whose matrix is quantized."""
    modules: dict[str, None] = {}
    for name, tensor in stored.items():
        for main in layout.mains:
            if name.endswith(f".{main}") and not (main == "weight" and tensor.is_float):
                modules[name.removesuffix(f".{main}")] = None
    return list(modules)


def _is_zero_bias(name: str, tensor: StoredTensor) -> bool:
    return name.endswith("_proj.bias") and tensor.is_float and not tensor.weight().dequantize().any()
