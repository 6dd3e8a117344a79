"""LoRA adapters as the files that other programs write."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint.gguf_writer import write_gguf
from puna.checkpoint.names import gguf_name, rotary_heads
from puna.checkpoint.safetensors import write_safetensors
from puna.config import ModelConfig
from puna.tensor import Adapter, Weight


def write_peft_tensors(folder: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    """A folder as PEFT writes it; a field of None is left out."""
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", "init_lora_weights": True} | fields
    folder.mkdir(exist_ok=True)
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(kept), encoding="utf-8")
    write_safetensors(folder, {name: Weight.from_array(name, array) for name, array in tensors.items()})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    return folder


def write_peft(folder: Path, adapter: Adapter) -> Path:
    """One whose changes all have the same rank and scale."""
    change = next(iter(adapter.changes.values()))
    tensors = {}
    for name, matrices in adapter.changes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": matrices.a, f"{module}.lora_B.weight": matrices.b}
    return write_peft_tensors(folder, tensors, r=change.rank, lora_alpha=change.scale * change.rank)


def write_lora_gguf(path: Path, adapter: Adapter, config: ModelConfig, alpha: float, **metadata: Any) -> Path:
    """As llama.cpp's convert_lora_to_gguf.py does: rows of B of queries and keys in Meta's order."""
    arrays = {}
    for name, change in adapter.changes.items():
        heads, b = rotary_heads(config, name), change.b
        if heads is not None:
            b = b.reshape(heads, 2, len(b) // heads // 2, -1).swapaxes(1, 2).reshape(b.shape)
        arrays[gguf_name(name) + ".lora_a"], arrays[gguf_name(name) + ".lora_b"] = change.a, b
    values = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    } | {key.replace("__", "."): value for key, value in metadata.items()}
    weights = {name: Weight.from_array(name, array) for name, array in arrays.items()}
    kept = {key: value for key, value in values.items() if value is not None}
    shapes = {name: weight.shape for name, weight in weights.items()}
    write_gguf(path, kept, shapes, lambda name: (weights[name].type, [weights[name].data]))
    return path
