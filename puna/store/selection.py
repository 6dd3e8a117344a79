"""Which files of a folder or repository make up a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

from puna.errors import StoreError
from puna.store.manifest import is_file_name

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "model.safetensors.index.json",
    "params.json",
)
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_META_SHARD = re.compile(r"consolidated\.\d{2}\.pth")
_PREFERRED_QUANT = "q4_k_m"


def select_files(names: Iterable[str], choice: str | None, where: str) -> list[str]:
    """The files to take out of ``names`` (paths relative to ``where``; those in folders are passed over).

    ``choice`` is a file's name, or a quantization such as ``Q4_K_M``. Without it: safetensors with their
    configuration, else GGUF (Q4_K_M, or the only one), else Meta's shards. Raises StoreError when there is nothing,
    or no such choice.
    """
    files = sorted(name for name in names if is_file_name(name))
    ggufs = [name for name in files if name.lower().endswith(".gguf") and not name.lower().startswith("mmproj")]
    if choice is not None:
        return _chosen(files, ggufs, choice, where)
    companions = [name for name in files if name in _COMPANIONS]
    safetensors = [name for name in files if name.endswith(".safetensors")]
    if safetensors and "config.json" in files:
        # Some repositories repeat the weights under Meta's names.
        usual = [name for name in safetensors if not name.startswith("consolidated")]
        return sorted(companions + (usual or safetensors))
    if ggufs:
        models = {whole_name(name) for name in ggufs}
        if len(models) == 1:
            return ggufs
        preferred = [name for name in ggufs if _has_quant(name, _PREFERRED_QUANT)]
        if preferred:
            return preferred
        raise StoreError(f"{where} holds several GGUF models; choose one of {_listed(ggufs)} by :NAME")
    shards = [name for name in files if _META_SHARD.fullmatch(name)]
    if shards and "params.json" in files:
        return sorted(companions + shards)
    raise StoreError(
        f"{where} holds no model that Puna can read; expected *.gguf, *.safetensors with config.json, "
        "or consolidated.*.pth with params.json"
    )


def companions_of(file: str, names: Iterable[str]) -> list[str]:
    """A weights file with what belongs to it: the other parts of a split GGUF, a safetensors file's configuration."""
    split = _SPLIT.fullmatch(file)
    if split:
        return sorted(name for name in names if whole_name(name) == whole_name(file))
    if file.endswith(".safetensors"):
        return sorted({file, *(name for name in names if name in _COMPANIONS and not name.endswith(".index.json"))})
    return [file]


def check_parts(files: Iterable[str], where: str) -> None:
    """Raise StoreError when a part of a split GGUF is missing."""
    names = set(files)
    for name in sorted(names):
        split = _SPLIT.fullmatch(name)
        if split:
            stem, _, total, suffix = split.groups()
            for part in range(1, int(total) + 1):
                wanted = f"{stem}-{part:05d}-of-{total}{suffix}"
                if wanted not in names:
                    raise StoreError(f"{where} lacks {wanted}, one of the {int(total)} parts of a split GGUF")


def _chosen(files: list[str], ggufs: list[str], choice: str, where: str) -> list[str]:
    exact = [name for name in files if name.lower() == choice.lower()]
    if exact:
        return companions_of(exact[0], files)
    found = [name for name in ggufs if _has_quant(name, choice)]
    if len({whole_name(name) for name in found}) == 1:
        return found
    if found:
        raise StoreError(f"{choice!r} fits several files of {where}: {', '.join(found)}; give the whole file name")
    have = f"it has {_listed(ggufs)}" if ggufs else "it has no GGUF files"
    raise StoreError(f"{where} has no file for {choice!r}; {have}")


def _has_quant(name: str, quant: str) -> bool:
    """Whether a file's name has the quantization as a part of its own: Q4_K is not in model.Q4_K_M.gguf."""
    return re.search(rf"(?<![a-z0-9_]){re.escape(quant.lower())}(?![a-z0-9_])", name.lower()) is not None


def whole_name(name: str) -> str:
    """The name of a split GGUF without its part number; any other name as it is."""
    split = _SPLIT.fullmatch(name)
    return split.group(1) + split.group(4) if split else name


def _listed(names: list[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
