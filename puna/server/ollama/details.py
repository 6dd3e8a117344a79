"""What a stored model is, told as ollama tells it, without loading it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from puna.chat.builtin import builtin_template
from puna.checkpoint import Checkpoint, open_checkpoint
from puna.config import ModelConfig
from puna.errors import StoreError, TemplateError, TokenizerError
from puna.gguf_file import TextArray, read_gguf
from puna.llm.create import modelfile_of
from puna.model.shapes import parameter_count
from puna.store import Manifest, Store, resolve_stored
from puna.store.modelfile import write_modelfile

_THINKING_MARKS = ("<think>", "</think>", "enable_thinking", ".Think")
_SUFFIX_MARK = ".Suffix"
# Metadata whose arrays are as long as the vocabulary: null unless they are asked for.
_LONG = 100


def thinks(template: str) -> bool:
    """Whether a template has a place for reasoning."""
    return "thinking" in _abilities(template)


def details_of(manifest: Manifest, store: Store) -> dict[str, Any]:
    """Format, family, size and encoding. Raises StoreError, CheckpointError, ConfigError."""
    parent = manifest.lineage.parent if manifest.lineage else ""
    return {"parent_model": parent, **_file_details(resolve_stored(manifest, store).path)}


def show_model(manifest: Manifest, store: Store, *, verbose: bool) -> dict[str, Any]:
    """The answer of /api/show. Raises StoreError, CheckpointError, ConfigError."""
    path = resolve_stored(manifest, store).path
    checkpoint = open_checkpoint(path)
    template = manifest.template or checkpoint.chat_template or _builtin(checkpoint)
    shown: dict[str, Any] = {
        "modelfile": _modelfile(manifest, store, template),
        "parameters": "\n".join(f"{name:<30} {_quoted(value)}" for name, value in _parameters(manifest)),
        "template": template,
        "details": details_of(manifest, store),
        "model_info": _model_info(path, checkpoint, verbose=verbose),
        "capabilities": ["completion", *_abilities(template)],
        "modified_at": manifest.created,
    }
    own = {
        "license": "\n\n".join(manifest.licence_texts) or manifest.licence or checkpoint.description.get("license"),
        "system": manifest.system,
        "messages": [{"role": role, "content": content} for role, content in manifest.messages],
    }
    return shown | {key: value for key, value in own.items() if value}


def _abilities(template: str) -> list[str]:
    """Every model that can chat can be told of tools, whether its template says how or not."""
    found = [("insert", (_SUFFIX_MARK,)), ("thinking", _THINKING_MARKS)]
    tools = ["tools"] if template else []
    return tools + [ability for ability, marks in found if any(mark in template for mark in marks)]


@lru_cache(maxsize=256)
def _file_details(path: Path) -> dict[str, Any]:
    """Kept by path: in the store, that is by content."""
    checkpoint = open_checkpoint(path)
    architecture = checkpoint.config.architecture
    return {
        "format": "gguf" if path.suffix == ".gguf" else "safetensors",
        "family": architecture,
        "families": [architecture],
        "parameter_size": _rounded(parameter_count(checkpoint.config)),
        "quantization_level": _encoding(checkpoint),
    }


def _rounded(count: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{name}" if name == "B" else f"{count / unit:.2f}{name}"
    return str(count)


def _encoding(checkpoint: Checkpoint) -> str:
    """What the file says, else the type that most of the weights have."""
    if "file_type" in checkpoint.description:
        return str(checkpoint.description["file_type"])
    sizes = Counter[str]()
    for weight in checkpoint.tensors.values():
        sizes[weight.type.name] += weight.nbytes
    return sizes.most_common(1)[0][0]


def _model_info(path: Path, checkpoint: Checkpoint, *, verbose: bool) -> dict[str, Any]:
    """GGUF's metadata, and for other formats what GGUF would say of the configuration."""
    config: ModelConfig = checkpoint.config
    info = read_gguf(path).metadata if path.suffix == ".gguf" else dict(config.to_gguf())
    info.pop("tokenizer.chat_template", None)
    info.setdefault("general.architecture", config.architecture)
    info["general.parameter_count"] = parameter_count(config)
    if not verbose:
        long = [key for key, value in info.items() if isinstance(value, (list, TextArray)) and len(value) > _LONG]
        info |= dict.fromkeys(long)
    plain = {key: value.tolist() if isinstance(value, TextArray) else value for key, value in info.items()}
    return dict(sorted(plain.items()))


def _parameters(manifest: Manifest) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, given in manifest.parameters.items()
        for value in (given if isinstance(given, (list, tuple)) else [given])
    ]


def _builtin(checkpoint: Checkpoint) -> str:
    """The template of a model whose files hold none; empty for a base model."""
    try:
        return "" if checkpoint.tokenizer is None else builtin_template(checkpoint.tokenizer)
    except (TemplateError, TokenizerError):
        return ""


def _modelfile(manifest: Manifest, store: Store, template: str) -> str:
    """One that begins from the model itself: paths of this machine are nothing to a client."""
    name = str(manifest.model_name)
    try:
        return write_modelfile(replace(modelfile_of(manifest, store, template or None), from_=name, adapters=()))
    except StoreError as error:  # some texts cannot be quoted there
        return f"# {error}\nFROM {name}\n"


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
