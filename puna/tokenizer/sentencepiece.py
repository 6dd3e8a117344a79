"""SentencePiece's tokenizer.model: a protobuf message, read and written without a protobuf library.

Source: ``sentencepiece_model.proto`` of the SentencePiece project (field numbers and defaults).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from puna.errors import TokenizerError
from puna.tokenizer.vocabulary import TokenType, Vocabulary, derive_merges_from_scores

_UNIGRAM, _BPE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf wire types


@dataclass
class _Message:
    """The last value of each field, by number: an int, or bytes (strings, messages, fixed-width numbers)."""

    numbers: dict[int, int] = field(default_factory=dict)
    bytes: dict[int, bytes] = field(default_factory=dict)

    def number(self, key: int, default: int) -> int:
        return self.numbers.get(key, default)

    def text(self, key: int, default: str) -> str:
        try:
            return self.bytes[key].decode() if key in self.bytes else default
        except UnicodeDecodeError:
            raise TokenizerError("tokenizer.model holds a string that is not UTF-8") from None


def looks_like_model(data: bytes) -> bool:
    """Whether the bytes may be a SentencePiece model: they begin with a piece (field 1, a message)."""
    return data[:1] == b"\x0a"


def read_model(data: bytes) -> Vocabulary:
    """Parse a SentencePiece model, BPE or unigram. Raises TokenizerError."""
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer = normalizer = _Message()
    for key, value in _fields(data):
        if key not in (1, 2, 3) or isinstance(value, int):
            continue
        message = _parse(value)
        if key == 1:
            pieces.append(message.text(1, ""))
            scores.append(_float(message.bytes.get(2, bytes(4))))
            types.append(message.number(3, TokenType.NORMAL))
        elif key == 2:
            trainer = message
        else:
            normalizer = message
    model_type = trainer.number(3, _UNIGRAM)
    if model_type not in (_UNIGRAM, _BPE):
        raise TokenizerError(f"tokenizer.model has model_type {model_type}; expected 1 (unigram) or 2 (BPE)")
    if trainer.number(24, 0) or not normalizer.number(5, 1):
        raise TokenizerError("tokenizer.model marks spaces after words or not at all, which is not supported")
    control = {p: i for i, (p, kind) in enumerate(zip(pieces, types, strict=True)) if kind == TokenType.CONTROL}
    bos_id = control.get(trainer.text(46, "<s>"))
    return Vocabulary(
        kind="spm" if model_type == _BPE else "unigram",
        pieces=pieces,
        types=types,
        scores=scores,
        merges=derive_merges_from_scores(pieces, scores, types) if model_type == _BPE else [],
        space_prefix="segment" if normalizer.number(3, 1) else "never",
        charsmap=normalizer.bytes.get(2, b""),
        remove_extra_whitespaces=bool(normalizer.number(4, 1)),
        bos_id=bos_id,
        eos_id=control.get(trainer.text(47, "</s>")),
        unk_id=types.index(TokenType.UNKNOWN) if TokenType.UNKNOWN in types else None,
        pad_id=control.get(trainer.text(48, "<pad>")),
        add_bos=bos_id is not None,
    )


def write_model(vocabulary: Vocabulary) -> bytes | None:
    """The SentencePiece model of a vocabulary; None where it would encode text differently.

    SentencePiece knows no space rule but its own, and wants exactly one unknown token.
    """
    if vocabulary.space_prefix not in ("segment", "never") or vocabulary.types.count(TokenType.UNKNOWN) != 1:
        return None
    out = bytearray()
    for piece, score, kind in zip(vocabulary.pieces, vocabulary.scores, vocabulary.types, strict=True):
        text = piece.encode()
        row = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
        out += b"\x0a" + _varint(len(row)) + row
    trainer = _number(3, _BPE if vocabulary.kind == "spm" else _UNIGRAM)
    trainer += _number(4, len(vocabulary.pieces)) + _number(35, vocabulary.byte_fallback)
    ids = (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
    for number, token in enumerate(ids):
        trainer += _number(40 + number, -1 if token is None else token)
        if token is not None:
            trainer += _string(45 + number, vocabulary.pieces[token].encode())
    normalizer = _string(1, b"custom" if vocabulary.charsmap else b"identity") + _string(2, vocabulary.charsmap)
    normalizer += _number(3, vocabulary.space_prefix != "never") + _number(4, vocabulary.remove_extra_whitespaces)
    normalizer += _number(5, 1)
    return bytes(out + _string(2, trainer) + _string(3, normalizer))


def _parse(data: bytes) -> _Message:
    message = _Message()
    for key, value in _fields(data):
        if isinstance(value, int):
            message.numbers[key] = value
        else:
            message.bytes[key] = value
    return message


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message in order. No length is believed before it is compared with what is there."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _read_varint(data, position)
        wire = tag & 7
        if wire == _VARINT:
            value, position = _read_varint(data, position)
            yield tag >> 3, value
            continue
        if wire == _BYTES:
            size, position = _read_varint(data, position)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise TokenizerError(f"tokenizer.model is not a SentencePiece model: wire type {wire} at byte {position}")
        if size > end - position:
            raise TokenizerError(f"tokenizer.model is truncated: {size} bytes wanted, {end - position} left")
        yield tag >> 3, data[position : position + size]
        position += size


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise TokenizerError("tokenizer.model is truncated or not a SentencePiece model: a number does not end")


def _float(data: bytes) -> float:
    if len(data) != 4:
        raise TokenizerError(f"tokenizer.model has a score of {len(data)} bytes; expected 4")
    score: float = struct.unpack("<f", data)[0]
    return score


def _varint(value: int) -> bytes:
    value &= 0xFFFF_FFFF_FFFF_FFFF  # protobuf writes a negative int32 as 64 bits
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(key: int, value: int) -> bytes:
    return _varint(key << 3 | _VARINT) + _varint(value)


def _string(key: int, value: bytes) -> bytes:
    return _varint(key << 3 | _BYTES) + _varint(len(value)) + value
