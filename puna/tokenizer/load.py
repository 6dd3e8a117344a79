"""Open a tokenizer from whatever file holds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from puna.errors import TokenizerError
from puna.gguf_file import read_gguf
from puna.tokenizer import huggingface, sentencepiece, tiktoken
from puna.tokenizer.gguf import tokenizer_from_gguf
from puna.tokenizer.tokenizer import Tokenizer
from puna.tokenizer.vocabulary import Vocabulary

_MAX_BYTES = 256 << 20  # the largest real one, Llama 4's tokenizer.json, is under 30 MB


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at ``path``.

    ``path``: a folder (tokenizer.json is preferred to tokenizer.model), a tokenizer.json, a tokenizer.model
    (SentencePiece or tiktoken ranks, told apart by content), or a .gguf file. The tokenizer_config.json beside it is
    honoured.
    Raises TokenizerError when there is none or it is malformed, CheckpointError for a malformed .gguf file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        candidates = [path / "tokenizer.json", path / "tokenizer.model"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise TokenizerError(f"{path} holds no tokenizer.json and no tokenizer.model")
        path = found[0]
    if not path.is_file():
        raise TokenizerError(f"{path} does not exist")
    try:
        if path.suffix == ".gguf":
            return tokenizer_from_gguf(read_gguf(path).metadata)
        return Tokenizer(_read(path))
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def _read(path: Path) -> Vocabulary:
    config = _config_beside(path)
    if path.name.endswith(".json"):
        return huggingface.from_tokenizer_json(_json(path), config)
    data = _bytes(path)
    if tiktoken.looks_like_ranks(data):
        return huggingface.with_config(tiktoken.read_ranks(data), config)
    if sentencepiece.looks_like_model(data):
        return huggingface.with_config(sentencepiece.read_model(data), config)
    raise TokenizerError(
        "neither a SentencePiece model nor tiktoken ranks; expected a tokenizer.json or tokenizer.model"
    )


def _config_beside(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; for ``x.tokenizer.json`` also ``x.tokenizer_config.json``."""
    stem = path.name.removesuffix(".json").removesuffix(".model")
    config = path.with_name(f"{stem}_config.json")
    return _json(config) if stem.endswith("tokenizer") and config.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(_bytes(path))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise TokenizerError(f"{path.name} must hold a JSON object")
    return document


def _bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _MAX_BYTES:
        raise TokenizerError(f"{path.name} has {size} bytes, far more than any tokenizer; is it another file?")
    return path.read_bytes()
