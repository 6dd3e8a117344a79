"""A tokenizer's contents, whatever file they came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import compress
from typing import Literal, TypeAlias

from puna.errors import TokenizerError
from puna.gguf_file import TextArray

Kind: TypeAlias = Literal["bpe", "spm", "unigram"]
SpacePrefix: TypeAlias = Literal["segment", "metaspace", "first", "never"]

SPACE = "▁"  # U+2581, how SentencePiece writes a space inside a piece


class TokenType(IntEnum):
    """What a token is for. The numbers are those of SentencePiece's protobuf and of GGUF's ``token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's character for each byte: itself where it is printable Latin-1, else the next one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


BYTE_TO_CHAR = _byte_alphabet()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}
_LATIN1_TO_ALPHABET = {byte: char for byte, char in BYTE_TO_CHAR.items() if chr(byte) != char}


def byte_level(data: bytes) -> str:
    """Bytes spelled in GPT-2's alphabet, as byte-level vocabularies store them."""
    return data.decode("latin-1").translate(_LATIN1_TO_ALPHABET)


class JoinedMerges:
    """Merges as GGUF files spell them, ``left right``, taken apart when they are asked for: few programs ever do.

    Iterating raises TokenizerError for a text that is no pair.
    """

    def __init__(self, texts: TextArray) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for text in self.texts:
            left, space, right = text.partition(" ")
            if not left or not space or not right:
                raise TokenizerError(f"tokenizer.ggml.merges: {text[:100]!r} is not a pair of tokens")
            yield left, right

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (JoinedMerges, list)) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Vocabulary:
    """Everything that decides how text becomes ids. Index i of ``pieces``, ``types`` and ``scores`` is token id i.

    ``kind``: ``bpe`` (byte-level BPE: GPT-2, Llama 3 and 4), ``spm`` (SentencePiece BPE: Llama 1 and 2) or ``unigram``
    (SentencePiece unigram). ``pieces`` are spelled in GPT-2's byte alphabet (bpe) or with ▁ for a space (the others);
    control tokens are literal text. ``scores`` (SentencePiece only): a higher score merges earlier. ``merges``: pairs
    of pieces, first one first (not unigram).

    ``splits`` (bpe): regular expressions that cut the text, one after another, before merging. ``ignore_merges``: a cut
    that is itself a token is taken whole, as tiktoken does.

    ``space_prefix`` (SentencePiece) says where a space is put before text: ``segment``, at the start and after each
    parsed control token (SentencePiece itself, Meta's code, llama.cpp); ``metaspace``, the same unless a space is there
    already; ``first``, as metaspace but only at the start (transformers with legacy=False); ``never``. ``charsmap`` and
    ``remove_extra_whitespaces`` are SentencePiece's normalizer. ``add_bos``: whether the model wants ``bos_id`` first.

    Raises TokenizerError when the parts don't fit together.
    """

    kind: Kind
    pieces: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]] | JoinedMerges
    splits: tuple[str, ...] = ()
    ignore_merges: bool = False
    space_prefix: SpacePrefix = "never"
    charsmap: bytes = b""
    remove_extra_whitespaces: bool = False
    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    add_bos: bool = False

    def __post_init__(self) -> None:
        count = len(self.pieces)
        if count == 0:
            raise TokenizerError("the vocabulary is empty")
        if len(self.types) != count:
            raise TokenizerError(f"the vocabulary has {count} tokens but {len(self.types)} token types")
        if self.kind != "bpe" and len(self.scores) != count:
            raise TokenizerError(f"the vocabulary has {count} tokens but {len(self.scores)} scores")
        if any(map(math.isnan, self.scores)):
            raise TokenizerError("the vocabulary has a score that is not a number")
        if not {1, 2, 3, 4, 5, 6}.issuperset(self.types):
            raise TokenizerError("the vocabulary has a token type outside 1 to 6")
        if len(set(self.pieces)) != count:
            raise TokenizerError(f"the vocabulary lists the token {_first_duplicate(self.pieces)!r} twice")
        try:
            "".join(self.pieces).encode()
        except UnicodeEncodeError:
            raise TokenizerError("the vocabulary has a token that is not valid Unicode") from None
        if self.byte_fallback:
            for piece, kind in zip(self.pieces, self.types, strict=True):
                if kind == TokenType.BYTE:
                    byte_value(piece)
        for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < count:
                raise TokenizerError(f"{name} is {value}, outside the vocabulary of {count} tokens")
        if self.kind == "unigram" and self.unk_id is None:
            raise TokenizerError("a SentencePiece unigram vocabulary needs an unknown token; none is marked")

    def ids_of(self, *types: TokenType) -> dict[str, int]:
        """The tokens of these types, by piece."""
        return {self.pieces[i]: i for i in compress(range(len(self.types)), self.are(*types))}

    def are(self, *types: TokenType) -> bytes:
        """A byte for each token: 1 where it is of these types."""
        return bytes(self.types).translate(bytes(kind in types for kind in range(256)))

    @property
    def byte_fallback(self) -> bool:
        """Whether characters without a token are spelled as byte tokens such as <0x0A>."""
        return int(TokenType.BYTE) in self.types  # compared as plain numbers, which is many times faster


def byte_value(piece: str) -> int:
    """The byte of a byte token such as ``<0x0A>``. Raises TokenizerError when it is not spelled so."""
    try:
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return int(piece[3:5], 16)
    except ValueError:
        pass
    raise TokenizerError(f"the byte token {piece!r} is not spelled <0x00> to <0xFF>")


def derive_merges(by_priority: Iterable[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that forms another piece, in the order of the formed piece's priority.

    This gives the ids of SentencePiece and of tiktoken exactly, although they have one priority for each piece and not
    for each pair: two neighbours that form a piece are always the two that this piece, alone, would be reduced to,
    since no merge has crossed their outer borders; so of a piece's pairs only one ever occurs. Priorities must be
    distinct.
    """
    pieces = list(by_priority)
    known = set(pieces)
    return [
        (left, right)
        for piece in pieces
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in known and (right := piece[cut:]) in known
    ]


def derive_merges_from_scores(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE vocabulary: the best score first, normal pieces only."""
    normal = [i for i, kind in enumerate(types) if kind == TokenType.NORMAL]
    normal.sort(key=lambda i: -scores[i])  # stable: equal scores keep the order of ids
    return derive_merges(pieces[i] for i in normal)


def dense_pieces(ids: dict[str, int], what: str) -> tuple[list[str], list[int]]:
    """The pieces and types of a token -> id table; ids that no token has become unused tokens.

    Raises TokenizerError for negative ids, two tokens of one id, and ids far beyond the number of tokens.
    """
    limit = 2 * len(ids) + 1024
    pieces: list[str | None] = []
    for piece, token in sorted(ids.items(), key=lambda item: item[1]):
        if not 0 <= token < limit:
            raise TokenizerError(f"{what}: the token {piece!r} has id {token}; expected 0 to {limit - 1}")
        if token < len(pieces):
            raise TokenizerError(f"{what}: the tokens {pieces[token]!r} and {piece!r} share the id {token}")
        pieces.extend([None] * (token - len(pieces)))
        pieces.append(piece)
    types = [int(TokenType.UNUSED if piece is None else TokenType.NORMAL) for piece in pieces]
    return [f"[unused id {i}]" if piece is None else piece for i, piece in enumerate(pieces)], types


def _first_duplicate(pieces: Sequence[str]) -> str:
    seen: set[str] = set()
    for piece in pieces:
        if piece in seen:
            return piece
        seen.add(piece)
    raise AssertionError("no duplicate")
