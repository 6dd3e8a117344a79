"""A tokenizer in a GGUF file's metadata (``tokenizer.ggml.*``), read and written.

Source: the GGUF specification of the ggml project, and llama.cpp's defaults for absent keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from puna.errors import TokenizerError
from puna.gguf_file import TextArray
from puna.tokenizer.patterns import LLAMA3_NAMES, name_of, splits_of
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.vocabulary import JoinedMerges, TokenType, Vocabulary, derive_merges_from_scores

_PREFIX = "tokenizer.ggml."
# Written where the vocabulary has such a token: llama.cpp stops at each of them.
_END_KEYS = {"eot_token_id": ("<|eot_id|>", "<|eot|>", "<|im_end|>"), "eom_token_id": ("<|eom_id|>", "<|eom|>")}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file. Arrays may be lists or numpy arrays. Raises TokenizerError."""
    model = metadata.get(_PREFIX + "model")
    if model == "llama":
        return Tokenizer(_sentencepiece(metadata))
    if model == "gpt2":
        return Tokenizer(_byte_level(metadata))
    raise TokenizerError(
        f"tokenizer.ggml.model is {model!r}; expected 'llama' (SentencePiece) or 'gpt2' (byte-level BPE)"
    )


def tokenizer_to_gguf(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ``tokenizer.ggml.*`` metadata of a tokenizer, as llama.cpp reads it.

    Plain Python values: GGUF wants ids as uint32, ``token_type`` as int32 and ``scores`` as float32.
    Raises TokenizerError for a unigram vocabulary, or one cut by patterns that GGUF has no name for.
    """
    vocabulary = tokenizer.vocabulary
    if vocabulary.kind == "unigram":
        raise TokenizerError("a SentencePiece unigram vocabulary can't be written to a Llama GGUF file")
    values: dict[str, Any] = {
        "model": "gpt2" if vocabulary.kind == "bpe" else "llama",
        "pre": name_of(vocabulary.splits) if vocabulary.kind == "bpe" else "default",
        "tokens": vocabulary.pieces,
        "token_type": [int(kind) for kind in vocabulary.types],
    }
    if vocabulary.kind == "bpe":
        values["merges"] = [f"{left} {right}" for left, right in vocabulary.merges]
    else:
        values["scores"] = vocabulary.scores
        values["add_space_prefix"] = vocabulary.space_prefix != "never"
        values["remove_extra_whitespaces"] = vocabulary.remove_extra_whitespaces
    ids = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "unknown_token_id": vocabulary.unk_id,
        "padding_token_id": vocabulary.pad_id,
    }
    for key, names in _END_KEYS.items():
        found = [tokenizer.special_tokens[name] for name in names if name in tokenizer.special_tokens]
        ids[key] = found[0] if found else None
    values.update({key: token for key, token in ids.items() if token is not None})
    values["add_bos_token"] = vocabulary.add_bos
    return {_PREFIX + key: value for key, value in values.items()}


def _sentencepiece(metadata: Mapping[str, Any]) -> Vocabulary:
    pieces = _texts(metadata, "tokens")
    types = _types(metadata, len(pieces))
    scores = [float(score) for score in _array(metadata, "scores")]
    if len(scores) != len(pieces):
        raise TokenizerError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(pieces)} tokens")
    return Vocabulary(
        kind="spm",
        pieces=pieces,
        types=types,
        scores=scores,
        merges=derive_merges_from_scores(pieces, scores, types),
        space_prefix="segment" if _flag(metadata, "add_space_prefix", True) else "never",
        remove_extra_whitespaces=_flag(metadata, "remove_extra_whitespaces", False),
        **_special_ids(metadata, {"bos_id": 1, "eos_id": 2, "unk_id": 0}),
        add_bos=_flag(metadata, "add_bos_token", True),
    )


def _byte_level(metadata: Mapping[str, Any]) -> Vocabulary:
    pieces = _texts(metadata, "tokens")
    pre = metadata.get(_PREFIX + "pre")
    splits = splits_of(pre)
    return Vocabulary(
        kind="bpe",
        pieces=pieces,
        types=_types(metadata, len(pieces)),
        scores=[],
        merges=JoinedMerges(_text_array(metadata, "merges")),
        splits=splits,
        ignore_merges=pre in LLAMA3_NAMES,
        **_special_ids(metadata, {}),
        add_bos=_flag(metadata, "add_bos_token", pre in LLAMA3_NAMES),
    )


def _special_ids(metadata: Mapping[str, Any], defaults: dict[str, int]) -> dict[str, Any]:
    keys = {
        "bos_id": "bos_token_id",
        "eos_id": "eos_token_id",
        "unk_id": "unknown_token_id",
        "pad_id": "padding_token_id",
    }
    ids: dict[str, Any] = {}
    for field, key in keys.items():
        value = metadata.get(_PREFIX + key, defaults.get(field))
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TokenizerError(f"tokenizer.ggml.{key} is {value!r}; expected a token id")
            # Some writers store -1 or 2^32 - 1 for "none".
            ids[field] = int(value) if 0 <= int(value) < 0xFFFF_FFFF else None
    return ids


def _types(metadata: Mapping[str, Any], count: int) -> list[int]:
    if _PREFIX + "token_type" not in metadata:
        return [int(TokenType.NORMAL)] * count
    return list(map(int, _array(metadata, "token_type")))


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(_PREFIX + key)
    if isinstance(values, TextArray):
        return values.tolist()
    values = _array(metadata, key)
    if not {str}.issuperset(map(type, values)):
        raise TokenizerError(f"tokenizer.ggml.{key} must be an array of strings")
    return values


def _text_array(metadata: Mapping[str, Any], key: str) -> TextArray:
    values = metadata.get(_PREFIX + key)
    return values if isinstance(values, TextArray) else TextArray.of(_texts(metadata, key))


def _array(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(_PREFIX + key)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        raise TokenizerError(f"tokenizer.ggml.{key} is missing or not an array")
    return list(value)


def _flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(_PREFIX + key, default)
    if not isinstance(value, (bool, np.bool_)):
        raise TokenizerError(f"tokenizer.ggml.{key} is {value!r}; expected true or false")
    return bool(value)
