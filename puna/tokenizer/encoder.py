"""Plain text to ids: the merging itself, without control tokens and without normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

from puna.errors import TokenizerError
from puna.tokenizer.vocabulary import SPACE, JoinedMerges, TokenType, Vocabulary

try:
    from puna._native import Bpe
except ImportError:  # the extension was not built; the library does the same, and takes longer to start
    Bpe = None

_HIDDEN = (TokenType.CONTROL, TokenType.UNUSED)  # of these types no text may spell a token


def plain_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """A function that gives the ids of plain text. Raises TokenizerError for parts that don't fit together."""
    if vocabulary.kind == "bpe" and Bpe is not None and not vocabulary.byte_fallback:
        return _native_encoder(vocabulary)
    library = library_for(vocabulary)
    # The fast method is the one without offsets.
    return lambda text: library.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _native_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """The library cuts the text, csrc/bpe.cpp merges the words: the merges need no tables of the library's own."""
    merges = vocabulary.merges
    spelled = merges.texts.encoded if isinstance(merges, JoinedMerges) else merges
    try:
        bpe = Bpe(vocabulary.pieces, vocabulary.are(*_HIDDEN), spelled, len(merges), vocabulary.ignore_merges)
        cutter = _cutter(vocabulary)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"the vocabulary is inconsistent: {error}") from error

    def encode(text: str) -> list[int]:
        words = [word for word, _ in cutter.pre_tokenize_str(text)]
        try:
            ids: list[int] = bpe.encode(words)
        except ValueError as error:
            raise TokenizerError(f"the vocabulary is inconsistent: {error}") from error
        return ids

    return encode


def _cutter(vocabulary: Vocabulary) -> Any:
    """Cuts text into words, spelled in GPT-2's byte alphabet."""
    cuts: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") for split in vocabulary.splits]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def library_for(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    hidden = vocabulary.are(*_HIDDEN)
    visible = {piece: i for i, piece in enumerate(vocabulary.pieces) if not hidden[i]}
    try:
        if vocabulary.kind == "unigram":
            return tokenizers.Tokenizer(_unigram_model(vocabulary, set(visible.values())))
        unknown = vocabulary.ids_of(TokenType.UNKNOWN) if vocabulary.kind == "spm" else {}
        library = tokenizers.Tokenizer(
            models.BPE(
                visible,
                list(vocabulary.merges),
                unk_token=next(iter(unknown), None),
                fuse_unk=True,
                byte_fallback=vocabulary.byte_fallback,
                ignore_merges=vocabulary.ignore_merges,
            )
        )
        if vocabulary.kind == "bpe":
            library.pre_tokenizer = _cutter(vocabulary)
        elif SPACE in visible and not any(SPACE in piece.lstrip(SPACE) for piece in visible):
            # No token spans the start of a word, so words can be merged (and cached) one by one: four times as fast.
            library.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]+|{SPACE}+"), "isolated")
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"the vocabulary is inconsistent: {error}") from error
    return library


def _unigram_model(vocabulary: Vocabulary, visible: set[int]) -> models.Unigram:
    # The model wants one row for each id. One that no text may spell (the unknown token is one, too) gets a name with a
    # space, which normalized text never holds.
    rows = [
        (piece if i in visible and i != vocabulary.unk_id else f" {i}", score)
        for i, (piece, score) in enumerate(zip(vocabulary.pieces, vocabulary.scores, strict=True))
    ]
    return models.Unigram(rows, unk_id=vocabulary.unk_id, byte_fallback=vocabulary.byte_fallback)
