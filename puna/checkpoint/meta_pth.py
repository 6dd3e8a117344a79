"""Meta's release folders: consolidated.NN.pth (one for each tensor-parallel rank), params.json and tokenizer.model.

Layout: https://github.com/meta-llama/llama-models. A linear layer is split by outputs (column-parallel) or by inputs
(row-parallel, ``wo`` and ``w2``); norms are repeated. Token embeddings are split by width up to Llama 2, since then by
vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from puna.checkpoint.atomic import atomic_folder
from puna.checkpoint.checkpoint import Checkpoint
from puna.checkpoint.json_file import read_json, write_json
from puna.checkpoint.names import check_tensors, hf_name_from_meta, hf_names, meta_name, to_half_split, to_interleaved
from puna.checkpoint.recode import encoded_pieces, equal_bytes, float_type
from puna.checkpoint.torch_zip import TorchFile, TorchWriter
from puna.config import ModelConfig
from puna.errors import CheckpointError
from puna.tensor import Weight
from puna.tokenizer import Tokenizer, load_tokenizer

_RELEASED_VOCABULARIES = (32000, 32016, 128256)  # Llama 1 and 2, Code Llama, Llama 3
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_SPLIT_BY_INPUT = ("attention.wo.weight", "feed_forward.w2.weight")


class MetaFormat:
    """A folder with params.json and consolidated.NN.pth, or one .pth or .pt file beside its params.json."""

    def matches(self, path: Path) -> bool:
        if path.is_dir():
            return any(path.glob("consolidated*.pth"))
        return path.suffix in (".pth", ".pt")

    def read(self, path: Path) -> Checkpoint:
        folder = path if path.is_dir() else path.parent
        params_path = folder / "params.json"
        if not params_path.exists():
            raise CheckpointError(f"{path}: params.json is missing beside it; copy it from where the weights came from")
        shards = [TorchFile(file) for file in _shard_paths(path)]
        layout = _Layout(shards, read_json(params_path))
        check_tensors(layout.config, {name: layout.shapes[layout.meta[name]] for name in layout.meta}, str(path))
        return Checkpoint(
            config=_with_token_ids(layout.config, folder),
            tensors=_MetaTensors(layout),
            read_tokenizer=partial(_read_tokenizer, folder),
            description={"name": folder.resolve().name},
        )

    def write(self, checkpoint: Checkpoint, path: Path, weight_type: str | None) -> None:
        """One consolidated.00.pth that torch loads; ``weight_type`` is F32, F16, BF16 or None (quantized becomes F16).

        The chat template and the special token ids have no place in this format. Raises ConfigError for biases and for
        RoPE scalings that Meta's models do not have.
        """
        config = checkpoint.config
        with atomic_folder(path) as folder:
            write_json(folder / "params.json", config.to_meta())
            writer = TorchWriter(folder / "consolidated.00.pth")
            for name in hf_names(config):
                weight = to_interleaved(checkpoint.tensors[name], config)
                kind = float_type(weight, weight_type)
                writer.add(meta_name(name), weight.shape, kind, encoded_pieces(weight, kind))
            if config.tie_word_embeddings:
                writer.add_alias(_HEAD, _EMBEDDING)
            writer.close()
            if checkpoint.tokenizer is not None:
                _write_tokenizer(folder, checkpoint.tokenizer)


class _Layout:
    """How the shards make up the model: the axis each tensor is joined along, whole shapes, and names."""

    def __init__(self, shards: list[TorchFile], params: Mapping[str, object]) -> None:
        self.shards = shards
        first = shards[0]
        for other in shards[1:]:
            if set(other) != set(first):
                raise CheckpointError(
                    f"{other.path}: holds other tensors than {first.path.name}; are both of one model?"
                )
            for name in other:
                if other.shape(name) != first.shape(name):
                    raise CheckpointError(
                        f"{other.path}: {name} has shape {other.shape(name)}, in {first.path.name} "
                        f"it has {first.shape(name)}"
                    )
        for needed in (_EMBEDDING, "layers.0.feed_forward.w1.weight"):
            if needed not in first:
                raise CheckpointError(f"{first.path}: {needed} is missing; this is not a Llama model from Meta")
        width = params.get("dim")
        self.axes = {name: self._axis(name, width) for name in first}
        self.shapes = {name: self._whole_shape(name) for name in first}
        config = ModelConfig.from_meta(
            params,
            vocab_size=self.shapes[_EMBEDDING][0],
            intermediate_size=self.shapes["layers.0.feed_forward.w1.weight"][0],
        )
        # Reading the two sizes from the file is right for what params.json leaves open; what it states must agree.
        stated = params.get("vocab_size", -1)
        if stated not in (-1, config.vocab_size):
            raise CheckpointError(
                f"{first.path}: the embedding has {config.vocab_size} rows, but params.json says vocab_size "
                f"{stated!r}; is a part of the model missing?"
            )
        tied = self._is_tied()
        self.config = replace(config, tie_word_embeddings=tied)
        self.meta = {hf_name_from_meta(name) or name: name for name in first if not self._is_skipped(name, tied)}

    def _axis(self, name: str, width: object) -> int | None:
        shape = self.shards[0].shape(name)
        if len(self.shards) == 1 or len(shape) == 1:
            return None
        if name == _EMBEDDING:
            return 0 if shape[1] == width else 1
        return 1 if name.endswith(_SPLIT_BY_INPUT) else 0

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        shape, axis = self.shards[0].shape(name), self.axes[name]
        return tuple(size * len(self.shards) if i == axis else size for i, size in enumerate(shape))

    def _is_tied(self) -> bool:
        """The small 3.2 models store one matrix as both embedding and head."""
        if _HEAD not in self.shards[0]:
            return True
        if self.axes[_HEAD] != self.axes[_EMBEDDING]:
            return False  # Llama 1 and 2, none of which is tied
        return all(
            shard.same_storage(_EMBEDDING, _HEAD) or equal_bytes(shard[_EMBEDDING], shard[_HEAD])
            for shard in self.shards
        )

    @staticmethod
    def _is_skipped(name: str, tied: bool) -> bool:
        return name == "rope.freqs" or (tied and name == _HEAD)


class _MetaTensors(Mapping[str, Weight]):
    """The tensors under Hugging Face names, joined and reordered when asked for."""

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout

    def __getitem__(self, name: str) -> Weight:
        layout = self._layout
        meta = layout.meta[name]
        axis = layout.axes[meta]
        if axis is None:
            weight = layout.shards[0][meta]
        else:
            parts = [shard[meta] for shard in layout.shards]
            if any(part.type != parts[0].type for part in parts):
                raise CheckpointError(f"{meta}: the parts of the model store it as different types")
            weight = Weight(
                meta, layout.shapes[meta], parts[0].type, np.concatenate([p.data for p in parts], axis=axis)
            )
        return to_half_split(weight.rename(name), layout.config)

    def __contains__(self, name: object) -> bool:
        return name in self._layout.meta

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.meta)

    def __len__(self) -> int:
        return len(self._layout.meta)


def _shard_paths(path: Path) -> list[Path]:
    """All parts of the model in rank order. Raises CheckpointError when one is missing."""
    if path.is_file() and not re.fullmatch(r"consolidated\.\d+\.pth", path.name):
        return [path]
    folder = path if path.is_dir() else path.parent
    found = sorted(folder.glob("consolidated*.pth"))
    if len(found) == 1:
        return found
    for rank, file in enumerate(found):
        if file.name != f"consolidated.{rank:02d}.pth":
            raise CheckpointError(
                f"{folder}: expected consolidated.{rank:02d}.pth, found {file.name}; a part is missing"
            )
    return found


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    for place in (folder, folder.resolve().parent):
        for name in ("tokenizer.model", "tokenizer.json"):
            if (place / name).exists():
                return load_tokenizer(place / name)
    return None


def _with_token_ids(config: ModelConfig, folder: Path) -> ModelConfig:
    """The format has no place for special ids. Those of a vocabulary that no release has are known to its tokenizer."""
    if config.vocab_size in _RELEASED_VOCABULARIES:
        return config
    tokenizer = _read_tokenizer(folder)
    if tokenizer is None:
        return config
    eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    return replace(config, bos_token_id=tokenizer.bos_id, eos_token_ids=eos, pad_token_id=tokenizer.pad_id)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """As tokenizer.model, which Meta's code reads; a vocabulary that it cannot express, as tokenizer.json."""
    vocabulary = tokenizer.to_tokenizer_model()
    if vocabulary is not None:
        (folder / "tokenizer.model").write_bytes(vocabulary)
    else:
        write_json(folder / "tokenizer.json", tokenizer.to_tokenizer_json())
        write_json(folder / "tokenizer_config.json", tokenizer.to_tokenizer_config())
