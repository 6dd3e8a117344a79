"""Words that must not be written, as the token sequences that SamplingParams.bad_words_ids takes."""

from __future__ import annotations

from collections.abc import Sequence

from puna.engine.spelling import spelling
from puna.errors import RequestError
from puna.tokenizer import Tokenizer


def bad_words_ids(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[int]]:
    """The tokens of each word, as written at the start of a text, and after a space. Raises RequestError.

    Other ways to cut a word into tokens stay possible: a model that wants it badly can spell it in letters.
    """
    if isinstance(words, str) or not all(isinstance(word, str) and word.strip() for word in words):
        raise RequestError(f"bad_words must be a list of words, found {str(words)[:100]}")
    found = []
    for word in words:
        plain = word.lstrip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for text in (plain, " " + plain):
            ids = spelling(tokenizer.encode, tokenizer.token_bytes, text)
            if ids is not None and ids not in found:
                found.append(ids)
    return found
