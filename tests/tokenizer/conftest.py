"""Tokenizers that several test files share: each is loaded once."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from puna.tokenizer import Tokenizer, load_tokenizer


@lru_cache(maxsize=16)
def _load(path: Path) -> Tokenizer:
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def tokenizer_data(shared_data: Path) -> Path:
    return shared_data / "tokenizers"


@pytest.fixture(scope="session")
def llama2(tokenizer_data: Path) -> Tokenizer:
    return _load(tokenizer_data / "llama2.tokenizer.model")


@pytest.fixture(scope="session")
def llama3(tokenizer_data: Path) -> Tokenizer:
    return _load(tokenizer_data / "llama3.tokenizer.model")


@pytest.fixture(scope="session")
def llama3_json(tokenizer_data: Path) -> Tokenizer:
    return _load(tokenizer_data / "llama3.1.tokenizer.json")


@pytest.fixture(scope="session")
def llama4(tokenizer_data: Path) -> Tokenizer:
    return _load(tokenizer_data / "llama4.tokenizer.model")


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Tokenizer:
    return _load(shared_data / "weights" / "stories260K" / "hf")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    return _load(smollm2_path)


@pytest.fixture(scope="session")
def gguf_tokenizers(tokenizer_data: Path) -> dict[str, Tokenizer]:
    return {kind: _load(tokenizer_data / f"ggml-vocab-llama-{kind}.gguf") for kind in ("spm", "bpe")}


@pytest.fixture
def named(request: pytest.FixtureRequest) -> Any:
    """The fixture whose name is the parameter."""
    return request.getfixturevalue(request.param)
