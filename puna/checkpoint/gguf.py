"""GGUF files as checkpoints: which tensors and metadata make a Llama model, read and written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from puna.checkpoint.checkpoint import Checkpoint
from puna.checkpoint.gguf_writer import FILE_TYPES, MIX_FILE_TYPES, Encoded, write_gguf
from puna.checkpoint.names import (
    check_tensors,
    gguf_name,
    hf_name_from_gguf,
    hf_names,
    to_half_split,
    to_interleaved,
)
from puna.checkpoint.recode import encoded_pieces
from puna.config import ModelConfig, llama3_factors
from puna.errors import CheckpointError
from puna.gguf_file import MAGIC, GGUFFile, TextArray, read_gguf
from puna.tensor import QuantType, Weight, quant_type
from puna.tokenizer import Tokenizer
from puna.tokenizer.gguf import tokenizer_from_gguf, tokenizer_to_gguf

ROPE_FACTORS = "rope_freqs.weight"
NO_TOKENIZER = "no_vocab"
MAX_ROPE_FACTORS = 1 << 16
_UNUSED_TOKEN = 5  # token_type of a place in the vocabulary that no token fills
_NOT_DESCRIPTION = ("architecture", "alignment", "quantization_version", "file_type", "type", "quantization")


class GGUFFormat:
    """The entry in the table of formats."""

    def matches(self, path: Path) -> bool:
        if not path.is_file():
            return False
        if path.suffix == ".gguf":
            return True
        try:
            with path.open("rb") as file:
                return file.read(4) == MAGIC
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error

    def read(self, path: Path) -> Checkpoint:
        """Map a file, or all parts of a split one given any part. Raises CheckpointError, ConfigError."""
        return checkpoint_from_gguf(read_gguf(path))

    def write(self, checkpoint: Checkpoint, path: Path, weight_type: str | None) -> None:
        """Write one file, holding one tensor in memory at a time.

        Vectors (norms, biases) become F32, as llama.cpp requires. Matrices keep their type, or become ``weight_type``;
        those whose rows are not whole blocks of it become F16, and one warning says how many.
        Raises CheckpointError, ConfigError for what GGUF cannot express.
        """
        wanted = quant_type(weight_type) if weight_type else None
        if wanted and not wanted.can_encode:
            raise CheckpointError(f"{wanted.name} can be read but not written; choose another type")
        metadata, tensors = gguf_contents(checkpoint)
        unfit: list[str] = []

        def encode(name: str) -> Encoded:
            weight = tensors[name]
            kind = _stored_type(weight, wanted)
            if wanted and len(weight.shape) > 1 and kind != wanted:
                unfit.append(f"{weight.name} ({weight.shape[-1]})")
            return kind, encoded_pieces(weight, kind)

        write_gguf(path, metadata, tensors.shapes, encode)
        if wanted and unfit:
            warnings.warn(
                f"{len(unfit)} of {len(tensors)} tensors were written as F16, because their rows are not a multiple of "
                f"{wanted.block_size} as {wanted.name} needs; the first is {unfit[0]}",
                stacklevel=2,
            )


class GGUFTensors(Mapping[str, Weight]):
    """A checkpoint's tensors as a GGUF file holds them: its names, in its order, with its row order.

    ``shapes`` are known without reading a tensor. Looking one up raises CheckpointError when it is of another shape.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._expected = hf_names(checkpoint.config)
        found = {name: self._expected.get(name, ()) for name in checkpoint.tensors}
        check_tensors(checkpoint.config, found, "the model to be written")
        self._sources = {gguf_name(name): name for name in self._expected}
        self._factors = np.array(_rope_factors(checkpoint.config), np.float32)
        factors: dict[str, tuple[int, ...]] = {ROPE_FACTORS: self._factors.shape} if len(self._factors) else {}
        self.shapes = factors | {name: self._expected[source] for name, source in self._sources.items()}

    def __getitem__(self, name: str) -> Weight:
        if name == ROPE_FACTORS:
            return Weight.from_array(name, self._factors)
        config = self._checkpoint.config
        weight = self._checkpoint.tensors[self._sources[name]]
        if weight.shape != self._expected[weight.name]:
            check_tensors(config, self._expected | {weight.name: weight.shape}, "the model to be written")
        return to_interleaved(weight, config)

    def type(self, name: str) -> QuantType:
        """The type that a tensor has now."""
        source = self._sources.get(name)
        return quant_type("F32") if source is None else self._checkpoint.tensors[source].type

    def source(self, name: str) -> str | None:
        """The Hugging Face name of a tensor; None for one that only GGUF has."""
        return self._sources.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def gguf_contents(checkpoint: Checkpoint) -> tuple[dict[str, Any], GGUFTensors]:
    """What a GGUF file of this model holds: metadata without ``general.file_type``, and tensors.

    Raises CheckpointError, ConfigError for what GGUF cannot express.
    """
    return _metadata(checkpoint), GGUFTensors(checkpoint)


def checkpoint_from_gguf(file: GGUFFile) -> Checkpoint:
    """What a GGUF file means. Raises CheckpointError, ConfigError."""
    if not file.tensors:
        raise CheckpointError(f"{file.path} holds no tensors (it is a vocabulary only); expected a whole model")
    weights = dict(file.tensors)
    factors = weights.pop(ROPE_FACTORS, None)
    if factors is not None and (len(factors.shape) > 1 or factors.shape[0] > MAX_ROPE_FACTORS):
        raise CheckpointError(f"{file.path}: tensor {ROPE_FACTORS} has shape {factors.shape}, expected a short vector")
    config = ModelConfig.from_gguf(
        file.metadata,
        tie_word_embeddings="output.weight" not in weights,
        attention_bias="blk.0.attn_q.bias" in weights,
        mlp_bias="blk.0.ffn_gate.bias" in weights,
        rope_factors=() if factors is None else tuple(factors.dequantize().tolist()),
    )
    canonical = {}
    for name, weight in weights.items():
        name = hf_name_from_gguf(name) or name
        canonical[name] = weight.rename(name)
    check_tensors(config, {name: weight.shape for name, weight in canonical.items()}, str(file.path))
    template = file.metadata.get("tokenizer.chat_template")
    return Checkpoint(
        config=config,
        tensors=_HalfSplitTensors(canonical, config),
        read_tokenizer=lambda: _tokenizer(file.metadata),
        chat_template=template if isinstance(template, str) else None,
        description=_description(file.metadata),
    )


class _HalfSplitTensors(Mapping[str, Weight]):
    """Tensors as the file has them, whose query and key rows are put in Hugging Face's order when asked for."""

    def __init__(self, weights: dict[str, Weight], config: ModelConfig) -> None:
        self._weights = weights
        self._config = config

    def __getitem__(self, name: str) -> Weight:
        return to_half_split(self._weights[name], self._config)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer | None:
    if metadata.get("tokenizer.ggml.model", NO_TOKENIZER) == NO_TOKENIZER:
        return None
    return tokenizer_from_gguf(metadata)


def _description(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The ``general.*`` values that are for people, and the name of the file type."""
    general = {key.removeprefix("general."): value for key, value in metadata.items() if key.startswith("general.")}
    description = {
        key: value.tolist() if isinstance(value, TextArray) else value
        for key, value in general.items()
        if key not in _NOT_DESCRIPTION
    }
    names = {number: name for name, number in (FILE_TYPES | MIX_FILE_TYPES).items()}
    if isinstance(file_type := general.get("file_type"), int) and file_type in names:
        description["file_type"] = names[file_type]
    return description


def _stored_type(weight: Weight, wanted: QuantType | None) -> QuantType:
    if len(weight.shape) == 1:
        return quant_type("F32")
    kind = wanted or weight.type
    return quant_type("F16") if weight.shape[-1] % kind.block_size else kind


def _rope_factors(config: ModelConfig) -> tuple[float, ...]:
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "llama3":
        return llama3_factors(scaling, config.rope_theta, config.head_dim)
    return scaling.factors if scaling is not None else ()


def _metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    metadata: dict[str, Any] = {"general.architecture": "llama", "general.type": "model"}
    for key, value in checkpoint.description.items():
        words = isinstance(value, list) and all(isinstance(word, str) for word in value)
        if key not in _NOT_DESCRIPTION and (words or isinstance(value, (str, int, float))):
            metadata[f"general.{key}"] = value
    metadata |= config.to_gguf()
    metadata |= {"tokenizer.ggml.model": NO_TOKENIZER} if tokenizer is None else tokenizer_to_gguf(tokenizer)
    if config.eos_token_ids:  # the configuration says what ends a turn; a vocabulary only has the tokens
        for slot in ("eos", "eot", "eom"):
            metadata.pop(f"tokenizer.ggml.{slot}_token_id", None)
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    metadata |= _filled_vocabulary(metadata, config.vocab_size) | _token_ids(config, tokens)
    if checkpoint.chat_template is not None:
        metadata["tokenizer.chat_template"] = checkpoint.chat_template
    return metadata


def _filled_vocabulary(metadata: Mapping[str, Any], size: int) -> dict[str, Any]:
    """llama.cpp wants a token for every row of the embedding; rows without one get a placeholder."""
    tokens = list(metadata.get("tokenizer.ggml.tokens", ()))
    if len(tokens) > size:
        raise CheckpointError(f"the tokenizer has {len(tokens)} tokens, but the embedding has only {size} rows")
    fillers: dict[str, list[Any]] = {
        "tokens": [f"[PAD{row}]" for row in range(len(tokens), size)],
        "scores": [0.0] * (size - len(tokens)),
        "token_type": [_UNUSED_TOKEN] * (size - len(tokens)),
    }
    keys = {f"tokenizer.ggml.{name}": filler for name, filler in fillers.items()}
    return {key: [*metadata[key], *filler] for key, filler in keys.items() if key in metadata}


def _token_ids(config: ModelConfig, tokens: list[str]) -> dict[str, int]:
    """The special ids. GGUF names at most three that end a turn (eos, eot, eom); further ones are not written."""
    ends = dict(zip(config.eos_token_ids, ["eos"], strict=False))
    rest = [token for token in config.eos_token_ids if token not in ends]
    for slot, text in (("eot", "<|eot_id|>"), ("eom", "<|eom_id|>")):
        named = [token for token in rest if token < len(tokens) and tokens[token] == text]
        ends |= dict.fromkeys(named[:1], slot)
    rest = [token for token in rest if token not in ends]
    free = [slot for slot in ("eot", "eom") if slot not in ends.values()]
    ends |= dict(zip(rest, free, strict=False))
    ids = {"bos": config.bos_token_id, "padding": config.pad_token_id} | {slot: token for token, slot in ends.items()}
    return {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items() if token is not None}
