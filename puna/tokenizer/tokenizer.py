"""Text to token ids and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

from tokenizers import normalizers

from puna.errors import TokenizerError
from puna.tokenizer import huggingface, sentencepiece, tiktoken
from puna.tokenizer.encoder import plain_encoder
from puna.tokenizer.vocabulary import CHAR_TO_BYTE, SPACE, TokenType, Vocabulary, byte_value

# Control tokens after which generation is over, beside the one a file calls EOS: a chat model may end with either.
_END_TOKENS = (
    "</s>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<|im_end|>",
    "<|endoftext|>",
    "▁<EOT>",
)


class Tokenizer:
    """One model's tokenizer, built from a ``Vocabulary``. Immutable, and safe to share between threads.

    Control tokens are never found in text unless ``parse_special`` asks for it: the library underneath doesn't know
    them. Raises TokenizerError when the vocabulary can't be used. Llama 3's merges in a GGUF file are read for the
    first word that is no token; what is wrong with them, ``encode`` says then.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.vocab_size = len(vocabulary.pieces)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.unk_id = vocabulary.unk_id
        self.pad_id = vocabulary.pad_id
        self.add_bos = vocabulary.add_bos
        self.special_tokens: dict[str, int] = vocabulary.ids_of(TokenType.CONTROL, TokenType.UNKNOWN)
        ends = {self.special_tokens[name] for name in _END_TOKENS if name in self.special_tokens}
        self.eos_ids = frozenset(ends if self.eos_id is None else ends | {self.eos_id})
        self.special_ids = frozenset(self.special_tokens.values())
        self._user_defined = vocabulary.ids_of(TokenType.USER_DEFINED)
        self._encode_text = plain_encoder(vocabulary)
        self._charsmap = normalizers.Precompiled(vocabulary.charsmap) if vocabulary.charsmap else None
        self._bytes: list[bytes | None] = [None] * self.vocab_size

    def encode(self, text: str, add_bos: bool = False, parse_special: bool = False) -> list[int]:
        """The ids of ``text``, after BOS where ``add_bos`` says so (always then: ``self.add_bos`` is only advice).

        ``parse_special`` turns the spelling of a control token (``<|eot_id|>``) into that token. A SentencePiece
        vocabulary may put a space before the text and after each parsed control token: see
        ``Vocabulary.space_prefix``. Surrogates that pair up are joined, a lone one becomes U+FFFD. As in the reference
        implementations, bytes for which a byte-level vocabulary has no token are left out.

        Raises TokenizerError when BOS is asked for and the vocabulary has none, and for text that the file's cutting
        pattern can't cope with.
        """
        ids: list[int] = []
        if add_bos:
            if self.bos_id is None:
                raise TokenizerError("add_bos: this tokenizer has no beginning-of-sequence token")
            ids.append(self.bos_id)
        text = _without_surrogates(text)
        if not parse_special:
            self._encode_segment(text, True, ids)
            return ids
        at_start = True
        for segment, token in _cut(text, self._special_pattern, self.special_tokens):
            if token is not None:
                ids.append(token)
            else:
                self._encode_segment(segment, at_start, ids)
            at_start = False
        return ids

    def encode_segments(self, segments: Iterable[str | int]) -> list[list[int]]:
        """The ids of each segment of one text: stretches of plain text, and control tokens that were chosen by id."""
        encoded: list[list[int]] = []
        for segment in segments:
            ids: list[int] = []
            if isinstance(segment, int):
                ids.append(segment)
            else:
                self._encode_segment(_without_surrogates(segment), not encoded, ids)
            encoded.append(ids)
        return encoded

    def encode_continuation(self, text: str) -> list[int]:
        """The ids of text that goes on after other tokens, as a model writes it: no space is put before it."""
        ids: list[int] = []
        self._encode_segment(_without_surrogates(text), False, ids, continued=True)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> bytes:
        """The text of ``ids`` as UTF-8 bytes; the last character may be incomplete.

        The inverse of ``encode(text, parse_special=True)``: the space that encode puts before a text segment is taken
        off. ``skip_special`` leaves control tokens out. To continue a text, use ``token_bytes``: it takes nothing off.

        Raises TokenizerError for an id outside the vocabulary.
        """
        prefix = self.vocabulary.space_prefix
        parts: list[bytes] = []
        strip = prefix != "never"
        for token in ids:
            data = self.token_bytes(token)
            if token in self.special_ids and skip_special:
                data = b""
            if self.vocabulary.types[token] == TokenType.CONTROL:
                strip = prefix in ("segment", "metaspace") or (strip and skip_special)
            elif strip and data:
                data = data.removeprefix(b" ")
                strip = self.vocabulary.remove_extra_whitespaces and not data  # then all leading spaces go
            parts.append(data)
        return b"".join(parts)

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that a token adds to a text; a control token gives its spelling. Raises TokenizerError."""
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"token id {token} is outside the vocabulary of {self.vocab_size} tokens")
        data = self._bytes[token]
        if data is None:
            data = self._bytes[token] = _piece_bytes(self.vocabulary, token)
        return data

    def is_special(self, token: int) -> bool:
        """Whether the token is a control token (or the unknown token), not text."""
        return token in self.special_ids

    def id_to_token(self, token: int) -> str:
        """A token as the vocabulary spells it (``Ġthe``, ``▁the``, ``<|eot_id|>``). Raises TokenizerError."""
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"token id {token} is outside the vocabulary of {self.vocab_size} tokens")
        return self.vocabulary.pieces[token]

    def token_to_id(self, piece: str) -> int | None:
        """The id of a token by its spelling in the vocabulary, or None."""
        return self._ids.get(piece)

    def to_tokenizer_json(self) -> dict[str, Any]:
        """The contents of Hugging Face's tokenizer.json. Raises TokenizerError for a unigram vocabulary."""
        return huggingface.to_tokenizer_json(self.vocabulary)

    def to_tokenizer_config(self) -> dict[str, Any]:
        """The contents of the tokenizer_config.json beside it (without a chat template)."""
        return huggingface.to_tokenizer_config(self.vocabulary)

    def to_tokenizer_model(self) -> bytes | None:
        """The contents of a tokenizer.model (SentencePiece or tiktoken ranks), or None where that can't express it."""
        if self.vocabulary.kind == "bpe":
            return tiktoken.write_ranks(self.vocabulary)
        return sentencepiece.write_model(self.vocabulary)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.vocabulary.pieces)}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        return _any_of(self.special_tokens)

    @cached_property
    def _user_defined_pattern(self) -> re.Pattern[str] | None:
        return _any_of(self._user_defined)

    def _encode_segment(self, text: str, at_start: bool, ids: list[int], continued: bool = False) -> None:
        """Append the ids of text without control tokens; user-defined tokens are always found, as in the references."""
        if self.vocabulary.kind != "bpe":
            text = self._with_spaces_marked(text, at_start, continued)
        for part, token in _cut(text, self._user_defined_pattern, self._user_defined):
            if token is not None:
                ids.append(token)
            else:
                ids.extend(self._encode_plain(part))

    def _encode_plain(self, text: str) -> list[int]:
        try:
            return self._encode_text(text)
        except BaseException as error:
            # The library's panic is not an Exception. It comes from a pattern that backtracks without end, which needs
            # a hostile tokenizer file, or millions of capital letters in a row.
            if type(error).__module__ != "pyo3_runtime":
                raise
            raise TokenizerError(f"the tokenizer's pattern can't cut this text of {len(text)} characters") from None

    def _with_spaces_marked(self, text: str, at_start: bool, continued: bool) -> str:
        """SentencePiece's normalization: character map, whitespace, the space before the text, ▁ for each space."""
        rules = self.vocabulary
        if self._charsmap is not None:
            text = self._charsmap.normalize_str(text)
        if rules.remove_extra_whitespaces:
            text = re.sub(" {2,}", " ", text)
            text = text if continued else text.lstrip(" ")
        text = text.replace(" ", SPACE)
        if rules.remove_extra_whitespaces:
            text = text.rstrip(SPACE)
        if continued or not text or rules.space_prefix == "never" or (rules.space_prefix == "first" and not at_start):
            return text
        if rules.space_prefix != "segment" and text.startswith(SPACE):
            return text
        return SPACE + text


def _piece_bytes(vocabulary: Vocabulary, token: int) -> bytes:
    piece, kind = vocabulary.pieces[token], vocabulary.types[token]
    if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
        return piece.encode()
    if kind == TokenType.BYTE:
        return bytes([byte_value(piece)])
    if vocabulary.kind != "bpe":
        return piece.replace(SPACE, " ").encode()
    if kind != TokenType.NORMAL:
        return piece.encode()
    try:
        return bytes([CHAR_TO_BYTE[char] for char in piece])
    except KeyError:  # an added token that its file doesn't mark as one
        return piece.encode()


def _any_of(words: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern for any of the words, the longest first."""
    ordered: Sequence[str] = sorted((word for word in words if word), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _without_surrogates(text: str) -> str:
    """Surrogates that pair up joined, a lone one as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _cut(text: str, pattern: re.Pattern[str] | None, ids: dict[str, int]) -> Iterator[tuple[str, int | None]]:
    """The text in order: stretches between matches (never empty) with None, and matches with their id."""
    end = 0
    if pattern is not None:
        for match in pattern.finditer(text):
            if match.start() > end:
                yield text[end : match.start()], None
            yield match[0], ids[match[0]]
            end = match.end()
    if end < len(text):
        yield text[end:], None
