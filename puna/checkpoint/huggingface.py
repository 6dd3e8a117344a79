"""Model folders as Hugging Face's transformers writes them: config.json, safetensors, tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from puna.checkpoint.atomic import atomic_folder
from puna.checkpoint.checkpoint import Checkpoint
from puna.checkpoint.hf_quantized.read import read_quantized
from puna.checkpoint.json_file import read_json, read_text, write_json
from puna.checkpoint.names import check_tensors
from puna.checkpoint.recode import float_type
from puna.checkpoint.safetensors import INDEX_NAME, StoredTensor, map_safetensors, write_safetensors
from puna.config import ModelConfig
from puna.errors import CheckpointError
from puna.tensor import Weight
from puna.tokenizer import Tokenizer, load_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsFormat:
    """A folder with config.json and model.safetensors (or shards and their index), or one such file beside its config.

    Quantized matrices are written as F16 unless another float type is asked for; nothing else is lost.
    """

    def matches(self, path: Path) -> bool:
        if path.is_dir():
            # A config.json alone claims the folder too, unless Meta's files are there, to say what is missing.
            claimed = (path / "config.json").exists() and not (path / "params.json").exists()
            return claimed or any(path.glob("*.safetensors"))
        return path.suffix == ".safetensors"

    def read(self, path: Path) -> Checkpoint:
        folder = path if path.is_dir() else path.parent
        config_path = folder / "config.json"
        if not config_path.exists():
            raise CheckpointError(f"{path}: config.json is missing beside it; copy it from where the weights came from")
        raw = read_json(config_path)
        config = _with_generation_config(folder, ModelConfig.from_hf(raw))
        stored = _canonical(path, config, _read_tensors(path))
        tensors: Mapping[str, Weight]
        description = {"name": folder.resolve().name}
        if raw.get("quantization_config") is None:
            tensors = {name: tensor.weight() for name, tensor in stored.items()}
            shapes = {name: weight.shape for name, weight in tensors.items()}
        else:
            tensors = read_quantized(
                str(config_path), raw["quantization_config"], stored, config.attention_bias or config.mlp_bias
            )
            shapes = tensors.shapes
            description["quantization"] = tensors.title
        check_tensors(config, shapes, str(path))
        return Checkpoint(
            config=config,
            tensors=tensors,
            read_tokenizer=partial(_read_tokenizer, folder),
            chat_template=_chat_template(folder),
            description=description,
        )

    def write(self, checkpoint: Checkpoint, path: Path, weight_type: str | None) -> None:
        """A folder that transformers loads; ``weight_type`` is F32, F16, BF16 or None."""
        extra = {"torch_dtype": _TORCH_NAMES[_matrix_type(checkpoint, weight_type)]}
        write_model_folder(
            checkpoint, path, extra, lambda folder: write_safetensors(folder, checkpoint.tensors, weight_type)
        )


def write_model_folder(
    checkpoint: Checkpoint, path: Path, extra: dict[str, Any], write_weights: Callable[[Path], None]
) -> None:
    """A folder of everything but the weights, which ``write_weights`` writes into it; it appears whole or not at all.

    ``extra`` are fields of config.json beside the architecture.
    """
    raw = checkpoint.config.to_hf() | extra
    generation = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw[key] is not None}
    with atomic_folder(path) as folder:
        write_json(folder / "config.json", raw)
        write_json(folder / "generation_config.json", generation)
        if checkpoint.tokenizer is not None:
            write_json(folder / "tokenizer.json", checkpoint.tokenizer.to_tokenizer_json())
            write_json(folder / "tokenizer_config.json", checkpoint.tokenizer.to_tokenizer_config())
        if checkpoint.chat_template is not None:
            (folder / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8", newline="")
        write_weights(folder)


def _matrix_type(checkpoint: Checkpoint, weight_type: str | None) -> str:
    """The type most numbers are stored as; the embedding stands for the matrices."""
    return float_type(checkpoint.tensors[EMBEDDING], weight_type).name


def _read_tensors(path: Path) -> dict[str, StoredTensor]:
    folder = path if path.is_dir() else path.parent
    index_path, single = folder / INDEX_NAME, folder / "model.safetensors"
    if path.is_file() and not _is_shard(path, index_path):
        return map_safetensors(path)
    if index_path.exists():
        return _read_shards(folder, index_path)
    if single.exists():
        return map_safetensors(single)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return map_safetensors(found[0])
    if any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{folder}: the weights are pytorch_model*.bin (pickle) files, which are not read; get the model's "
            "safetensors files, or load it with transformers and save it again with save_pretrained"
        )
    raise CheckpointError(f"{folder}: no weights here; expected model.safetensors or {INDEX_NAME} with its shards")


def _is_shard(path: Path, index_path: Path) -> bool:
    return index_path.exists() and path.name in set(_weight_map(index_path).values())


def _weight_map(index_path: Path) -> dict[str, str]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map must name the file of each tensor")
    for name, file_name in weight_map.items():
        # Only a plain name stays inside the folder on every system.
        if not isinstance(file_name, str) or not file_name.endswith(".safetensors") or set("/\\:\0") & set(file_name):
            raise CheckpointError(
                f"{index_path}: {name[:100]} is said to be in {str(file_name)[:200]!r}; expected a file of this folder"
            )
    return weight_map


def _read_shards(folder: Path, index_path: Path) -> dict[str, StoredTensor]:
    weight_map = _weight_map(index_path)
    shards: dict[str, dict[str, StoredTensor]] = {}
    for file_name in sorted(set(weight_map.values())):
        shard = folder / file_name
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing, though {INDEX_NAME} names it; fetch the rest of the model")
        shards[file_name] = map_safetensors(shard)
    tensors = {}
    for name, file_name in weight_map.items():
        if name not in shards[file_name]:
            raise CheckpointError(f"{folder / file_name}: {name} is missing, though {INDEX_NAME} says it is here")
        tensors[name] = shards[file_name][name]
    return tensors


def _canonical(source: Path, config: ModelConfig, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Drop old rotary buffers and a tied head; add the ``model.`` that checkpoints of the bare LlamaModel lack."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if not any(name.startswith("model.") for name in kept):
        kept = {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in kept.items()}
    if config.tie_word_embeddings and HEAD in kept and EMBEDDING in kept:
        if not kept[HEAD].equals(kept[EMBEDDING]):
            raise CheckpointError(
                f"{source}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}; "
                "set tie_word_embeddings to false in config.json if the head is meant to be its own"
            )
        del kept[HEAD]
    return {name: tensor.rename(name) for name, tensor in kept.items()}


def _with_generation_config(folder: Path, config: ModelConfig) -> ModelConfig:
    """generation_config.json often lists more end tokens than config.json (Llama 3: end of turn beside end of text)."""
    path = folder / "generation_config.json"
    if not path.exists():
        return config
    extra = read_json(path).get("eos_token_id")
    extra = extra if isinstance(extra, list) else [extra]
    if not all(item is None or type(item) is int for item in extra):
        raise CheckpointError(f"{path}: eos_token_id must be one token id or a list of them")
    ids = (*config.eos_token_ids, *(item for item in extra if item is not None))
    return replace(config, eos_token_ids=tuple(dict.fromkeys(ids)))


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return load_tokenizer(folder)
    return None


def _chat_template(folder: Path) -> str | None:
    """The template from chat_template.jinja, chat_template.json or tokenizer_config.json, in that order."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        return read_text(jinja)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not path.exists():
            continue
        template = read_json(path).get("chat_template")
        if isinstance(template, list):
            template = _default_template(path, template)
        if isinstance(template, str):
            return template
        if template is not None:
            raise CheckpointError(f"{path}: chat_template must be a text or a list of named texts")
    return None


def _default_template(path: Path, named: list[Any]) -> Any:
    """Of several named templates, the one called ``default``, or the only one."""
    if not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in named):
        raise CheckpointError(f"{path}: each chat_template in a list needs a name and a template")
    by_name = {item["name"]: item.get("template") for item in named}
    if "default" in by_name:
        return by_name["default"]
    return next(iter(by_name.values())) if len(by_name) == 1 else None
