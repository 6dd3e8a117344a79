"""Words as tokens, on vocabularies that treat the space before a word differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from puna.errors import RequestError
from puna.llm.bad_words import bad_words_ids
from puna.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(params=["weights/stories260K/tok512.model", "tokenizers/tiktoken_small.model"])
def tokenizer(request: pytest.FixtureRequest, shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / request.param)


@pytest.mark.parametrize("word", ["the", " the", "Once upon", "Ä€!", "x"])
def test_with_and_without_a_space(tokenizer: Tokenizer, word: str) -> None:
    plain, spaced = bad_words_ids(tokenizer, [word])
    assert b"".join(map(tokenizer.token_bytes, plain)) == word.strip().encode()
    assert b"".join(map(tokenizer.token_bytes, spaced)) == b" " + word.strip().encode()


def test_as_it_is_written_in_a_sentence(tokenizer: Tokenizer) -> None:
    _, spaced = bad_words_ids(tokenizer, ["the"])
    ids = tokenizer.encode("Once upon the time")
    assert any(ids[i : i + len(spaced)] == spaced for i in range(len(ids)))


def test_no_sequence_twice(tokenizer: Tokenizer) -> None:
    assert len(bad_words_ids(tokenizer, ["cat", " cat", "cat"])) == 2


@pytest.mark.parametrize("words", ["word", [""], [" "], [1], [None]])
def test_mistakes(tokenizer: Tokenizer, words: Any) -> None:
    with pytest.raises(RequestError, match="bad_words must be a list of words"):
        bad_words_ids(tokenizer, words)
