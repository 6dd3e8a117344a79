"""LoRA adapters, as PEFT's folders and as GGUF files: read into the low-rank changes of one model's matrices.

Sources: Hu et al. 2021; Kalajdzievski 2023 (rank-stabilised scaling); Liu et al. 2024 (DoRA); PEFT's ``LoraConfig`` and
checkpoint format; the GGUF specification ("adapter") and llama.cpp's ``llama-adapter.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint.json_file import read_json
from puna.checkpoint.names import half_split_order, hf_name_from_gguf, hf_names, rotary_heads
from puna.checkpoint.safetensors import read_safetensors
from puna.config import ModelConfig
from puna.config.fields import shown
from puna.errors import CheckpointError
from puna.gguf_file import read_gguf
from puna.tensor import Adapter, LowRank, Weight

CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_NUMBER = 1e6  # of alpha and the scale

# Fields of PEFT's configuration that, when set, make the adapter something else than scale · B · A.
_OTHER_METHODS = {
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "lora_bias": "biases of its own",
    "modules_to_save": "whole modules beside the low-rank ones (modules_to_save)",
    "trainable_token_indices": "trained tokens",
    "target_parameters": "changes of bare parameters (target_parameters)",
    "layer_replication": "replicated layers",
}
# Ways of starting the training that leave the model's own weights as they are; others (PiSSA, OLoRA, …) change those.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_PEFT_TENSOR = re.compile(
    r"base_model\.model\.(.{1,150})\.(?:lora_([AB])\.weight|lora_(magnitude)_vector(?:\.weight)?)"
)
_GGUF_TENSOR = re.compile(r"(.{1,150})\.lora_([ab])")
_PLAIN_KEY = re.compile(r"\^?[\w.]+")

# The matrices of a change by "a" and "b", and DoRA's "magnitude", as far as they were found.
Parts = dict[str, Weight]


def read_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """Read a LoRA adapter to be used beside a model of this configuration: a folder that PEFT saved, or a GGUF file.

    Raises CheckpointError when it is neither, is damaged, was made for another model, or is more than plain LoRA on the
    linear layers.
    """
    adapter = read_mergeable_adapter(path, config)
    if adapter.magnitudes:
        raise CheckpointError(
            f"{path}: the adapter uses DoRA, which is no low-rank change and can't be used beside a model; "
            "`puna merge MODEL ADAPTER DESTINATION` makes one model of both"
        )
    return adapter


def read_mergeable_adapter(path: str | Path, config: ModelConfig) -> Adapter:
    """As ``read_adapter``; DoRA is read too."""
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.name in (CONFIG_NAME, WEIGHTS_NAME):
        path = path.parent
    if path.is_dir():
        return _read_peft(path, config)
    return _read_gguf(path, config)


def _read_peft(folder: Path, config: ModelConfig) -> Adapter:
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    if not config_path.exists():
        raise CheckpointError(
            f"{folder} is not an adapter that Puna can read; expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, "
            "or a .gguf file"
        )
    raw = read_json(config_path)
    _check_method(config_path, raw)
    if not weights_path.exists():
        if (folder / PICKLE_NAME).exists():
            raise CheckpointError(
                f"{folder}: the adapter is {PICKLE_NAME} (a pickle file), which is not read; load it with PEFT and "
                "save it again with save_pretrained"
            )
        raise CheckpointError(f"{weights_path} is missing; fetch the rest of the adapter")
    pairs: dict[str, Parts] = {}
    for tensor, weight in read_safetensors(weights_path).items():
        found = _PEFT_TENSOR.fullmatch(tensor)
        if found is None:
            raise CheckpointError(f"{weights_path}: tensor {shown(tensor)} is not of a LoRA on a linear layer")
        module, side, magnitude = found.groups()
        if not module.startswith(("model.", "lm_head")):  # trained on the bare LlamaModel
            module = f"model.{module}"
        pairs.setdefault(f"{module}.weight", {})[magnitude or side.lower()] = weight
    alpha = _number(config_path, "lora_alpha", raw.get("lora_alpha", 8))
    alphas = _alpha_pattern(config_path, raw.get("alpha_pattern"))
    stable = bool(raw.get("use_rslora"))

    def scale(name: str, rank: int) -> float:
        module = name.removesuffix(".weight")
        own = next((value for matches, value in alphas if matches(module)), alpha)
        return own / rank**0.5 if stable else own / rank

    return _adapter(str(weights_path), config, pairs, scale, dora=bool(raw.get("use_dora")))


def _check_method(path: Path, raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: peft_type is {shown(kind)}; only LORA adapters are supported")
    for field, method in _OTHER_METHODS.items():
        if raw.get(field):
            raise CheckpointError(f"{path}: the adapter uses {method}, which is not supported; only plain LoRA is")
    if raw.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias is {shown(raw['bias'])}: trained biases are not supported, only 'none'")
    start = raw.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights is {shown(start)}, so the adapter belongs to a changed copy of the model; "
            "save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )


def _alpha_pattern(path: Path, raw: Any) -> list[tuple[Callable[[str], bool], float]]:
    """Which modules have an alpha of their own: the first entry that is the end of a module's name holds.

    PEFT takes the keys as regular expressions; only those that are plain names are read.
    """
    if raw is not None and not isinstance(raw, dict):
        raise CheckpointError(f"{path}: alpha_pattern must map module names to numbers, found {shown(raw)}")
    patterns: list[tuple[Callable[[str], bool], float]] = []
    for key, value in (raw or {}).items():
        if not _PLAIN_KEY.fullmatch(key):
            raise CheckpointError(f"{path}: alpha_pattern has {shown(key)}; only plain module names are supported")
        whole = key.startswith("^")
        name = key.removeprefix("^")

        def matches(module: str, name: str = name, whole: bool = whole) -> bool:
            return module == name or (not whole and module.endswith(f".{name}"))

        patterns.append((matches, _number(path, f"alpha_pattern of {key[:100]}", value)))
    return patterns


def _read_gguf(path: Path, config: ModelConfig) -> Adapter:
    file = read_gguf(path)
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora"), ("general.architecture", "llama")):
        found = file.metadata.get(key)
        if found != expected:
            raise CheckpointError(f"{path}: {key} is {shown(found)}; expected {expected!r}, as a LoRA adapter has it")
    if file.metadata.get("adapter.alora.invocation_tokens"):
        raise CheckpointError(f"{path}: the adapter uses activated LoRA, which is not supported; only plain LoRA is")
    alpha = _number(path, "adapter.lora.alpha", file.metadata.get("adapter.lora.alpha"))
    pairs: dict[str, Parts] = {}
    for tensor, weight in file.tensors.items():
        match = _GGUF_TENSOR.fullmatch(tensor)
        name = hf_name_from_gguf(match[1]) if match else None
        if match is None or name is None:
            raise CheckpointError(f"{path}: tensor {shown(tensor)} is not of a LoRA on a linear layer")
        pairs.setdefault(name, {})[match[2]] = weight
    # llama.cpp takes an alpha of 0 as none at all: a scale of 1.
    adapter = _adapter(str(path), config, pairs, lambda _, rank: alpha / rank if alpha else 1.0)
    return Adapter({name: _half_split(config, name, change) for name, change in adapter.changes.items()})


def _half_split(config: ModelConfig, name: str, change: LowRank) -> LowRank:
    """GGUF keeps the rows of queries and keys interleaved, and so those of B."""
    heads = rotary_heads(config, name)
    if heads is None:
        return change
    return LowRank(change.a, change.b[half_split_order(heads, config.head_dim)], change.scale)


def _adapter(
    source: str,
    config: ModelConfig,
    pairs: Mapping[str, Parts],
    scale: Callable[[str, int], float],
    *,
    dora: bool = False,
) -> Adapter:
    """Check the pairs (by Hugging Face names) against the model, and read them."""
    shapes = hf_names(config)
    if not pairs:
        raise CheckpointError(f"{source}: the adapter changes nothing; expected tensors lora_A and lora_B")
    changes, magnitudes = {}, {}
    for name, pair in pairs.items():
        module = name.removesuffix(".weight")
        if module in ("model.embed_tokens", "lm_head"):
            raise CheckpointError(
                f"{source}: the adapter changes {module}; only the linear layers of the blocks are supported "
                "(q, k, v, o, gate, up and down projections)"
            )
        shape = shapes.get(name)
        if shape is None or len(shape) != 2:
            raise CheckpointError(
                f"{source}: {shown(module)} is no linear layer of a Llama model of {config.num_hidden_layers} layers; "
                "the adapter was made for another model"
            )
        for side in "ab":
            if side not in pair:
                raise CheckpointError(f"{source}: {module} lacks lora_{side.upper()}; the file is incomplete")
        a, b = pair["a"], pair["b"]
        rank = a.shape[0]
        _check_shape(source, f"lora_A of {module}", a.shape, (max(rank, 1), shape[1]))
        _check_shape(source, f"lora_B of {module}", b.shape, (shape[0], rank))
        factor = scale(name, rank)
        changes[name] = LowRank(_numbers(source, module, a), _numbers(source, module, b), factor)
        if dora != ("magnitude" in pair):
            problem = (
                "lacks lora_magnitude_vector, which DoRA has" if dora else "has a lora_magnitude_vector without DoRA"
            )
            raise CheckpointError(f"{source}: {module} {problem} (use_dora in {CONFIG_NAME})")
        if dora:
            _check_shape(source, f"lora_magnitude_vector of {module}", pair["magnitude"].shape, shape[:1])
            magnitudes[name] = _numbers(source, module, pair["magnitude"])
    return Adapter(changes, magnitudes)


def _check_shape(source: str, what: str, found: Iterable[int], expected: tuple[int, ...]) -> None:
    if tuple(found) != expected:
        raise CheckpointError(
            f"{source}: {what} has shape {tuple(found)}, expected {expected}; the adapter was made for another model"
        )


def _numbers(source: str, module: str, weight: Weight) -> NDArray[np.float32]:
    """A copy, so that the file need not stay as it is."""
    values = np.array(weight.dequantize(), np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{source}: {module} holds numbers that are not finite; the file is damaged")
    return values


def _number(path: Path, field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
        raise CheckpointError(f"{path}: {field} must be a number of at most {MAX_NUMBER:.0f}, found {shown(value)}")
    return float(value)
