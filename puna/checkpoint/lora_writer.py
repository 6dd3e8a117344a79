"""LoRA adapters out: PEFT's folder and llama.cpp's GGUF file, and merged into the matrices that they change.

Sources: as of puna/checkpoint/lora.py, which reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.atomic import atomic_folder
from puna.checkpoint.checkpoint import Checkpoint
from puna.checkpoint.gguf_writer import write_gguf
from puna.checkpoint.json_file import write_json
from puna.checkpoint.lora import CONFIG_NAME, WEIGHTS_NAME
from puna.checkpoint.names import gguf_name, hf_names, interleaved_order, rotary_heads
from puna.checkpoint.recode import float_type
from puna.checkpoint.safetensors import write_safetensors
from puna.config import ModelConfig
from puna.errors import CheckpointError
from puna.tensor import Adapter, DeferredWeight, Weight, quant_type
from puna.tensor.mapped import drop_mapped_pages

_NUMBERS_AT_ONCE = 1 << 22


def write_peft(
    folder: str | Path,
    adapter: Adapter,
    config: ModelConfig,
    *,
    base_model: str | None = None,
    magnitudes: Mapping[str, NDArray[np.float32]] | None = None,
) -> None:
    """Write a folder that PEFT loads for a model of this configuration, float32, whole or not at all.

    ``base_model`` is the name that the folder gives for the model. ``magnitudes``, by matrix, make it DoRA. Raises
    CheckpointError when the folder holds something already, or the disk refuses.
    """
    ranks = {name: change.rank for name, change in adapter.changes.items()}
    alphas = {name: float(np.float32(change.scale * change.rank)) for name, change in adapter.changes.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    raw: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_module(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {_module(name): own for name, own in alphas.items() if own != alpha},
        "target_modules": _target_modules(adapter, config),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,  # its scale is in lora_alpha
        "use_dora": bool(magnitudes),
    }
    tensors: dict[str, Weight] = {}
    for name, change in adapter.changes.items():
        module = f"base_model.model.{_module(name)}"
        arrays = {f"{module}.lora_A.weight": change.a, f"{module}.lora_B.weight": change.b}
        if magnitudes:
            arrays[f"{module}.lora_magnitude_vector"] = magnitudes[name]
        tensors |= {key: Weight.from_array(key, array) for key, array in arrays.items()}
    with atomic_folder(Path(folder).expanduser()) as temporary:
        write_json(temporary / CONFIG_NAME, raw)
        write_safetensors(temporary, tensors, max_shard_bytes=1 << 62)
        (temporary / "model.safetensors").rename(temporary / WEIGHTS_NAME)


def write_gguf_adapter(path: str | Path, adapter: Adapter, config: ModelConfig) -> None:
    """Write a GGUF file that llama.cpp loads for a model of this configuration, float32.

    There is one alpha for all matrices; what a matrix's scale differs by goes into its B. Raises CheckpointError for
    DoRA, which the format has no place for, and when the disk refuses.
    """
    if adapter.magnitudes:
        raise CheckpointError(f"{path}: GGUF holds no DoRA; merge it (`puna merge`), or write a folder")
    alpha = _most_common({name: float(np.float32(c.scale * c.rank)) for name, c in adapter.changes.items()})
    if alpha == 0:  # which llama.cpp takes for a scale of 1
        raise CheckpointError(f"{path}: an adapter with a scale of 0 changes nothing; there is nothing to write")
    weights: dict[str, Weight] = {}
    for name, change in adapter.changes.items():
        b = change.b * np.float32(change.scale * change.rank / alpha)
        heads = rotary_heads(config, name)
        if heads is not None:
            b = b[interleaved_order(heads, config.head_dim)]
        stem = gguf_name(name)
        for key, array in ((f"{stem}.lora_a", change.a), (f"{stem}.lora_b", b)):
            weights[key] = Weight.from_array(key, array)
    metadata = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    shapes = {name: weight.shape for name, weight in weights.items()}
    write_gguf(Path(path).expanduser(), metadata, shapes, lambda name: (weights[name].type, [weights[name].data]))


def merge(checkpoint: Checkpoint, adapter: Adapter, *, keep_types: bool = False) -> Checkpoint:
    """The model with W + scale · B · A in place of every matrix that the adapter changes, and DoRA's rows scaled.

    Each is computed in float32 when it is read, and stays so, or with ``keep_types`` becomes what the matrix was, F16
    where that is quantized. Other tensors remain as they are.
    """
    return replace(checkpoint, tensors=_Merged(checkpoint.tensors, adapter, keep_types))


class _Merged(Mapping[str, Weight]):
    def __init__(self, tensors: Mapping[str, Weight], adapter: Adapter, keep_types: bool) -> None:
        self._tensors, self._adapter, self._keep_types = tensors, adapter, keep_types

    def __getitem__(self, name: str) -> Weight:
        weight = self._tensors[name]
        if name not in self._adapter.changes:
            return weight
        kind = float_type(weight, None) if self._keep_types else quant_type("F32")
        return DeferredWeight(name, weight.shape, kind, lambda: kind.encode(self._sum(name, weight)))

    def _sum(self, name: str, weight: Weight) -> NDArray[np.float32]:
        change = self._adapter.changes[name]
        values = np.empty(weight.shape, np.float32)
        b = change.b * np.float32(change.scale)
        step = max(1, _NUMBERS_AT_ONCE // weight.shape[1])
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            values[rows] = weight.take_rows(rows).dequantize() + b[rows] @ change.a
        drop_mapped_pages(weight.data)
        if (magnitude := self._adapter.magnitudes.get(name)) is not None:
            lengths = np.sqrt(np.einsum("ij,ij->i", values, values))
            values *= (magnitude / np.where(lengths == 0, 1, lengths))[:, None]
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name} with the adapter's change holds numbers that are not finite; one is damaged")
        return values

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _target_modules(adapter: Adapter, config: ModelConfig) -> list[str]:
    """The kinds of matrices where every layer's is changed (``q_proj``), else the matrices' whole names."""
    changed = {_module(name) for name in adapter.changes}
    kinds = {module.split(".")[-1] for module in changed}
    of_these_kinds = {_module(name) for name in hf_names(config) if _module(name).split(".")[-1] in kinds}
    return sorted(kinds if changed == of_these_kinds else changed)
