"""A vocabulary of single bytes, with which a constraint can be asked about any text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from puna.engine import Constraint, ConstraintState
from puna.engine.constraint import ConstraintCompiler

EOS = 256


class ByteVocabulary:
    """256 byte tokens, an end token that spells like text, and some longer tokens."""

    vocab_size = 257

    def __init__(self, longer: Sequence[bytes] = ()) -> None:
        self.tokens = [*(bytes([i]) for i in range(256)), b'"}', *longer]
        self.vocab_size = len(self.tokens)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]

    def is_special(self, token: int) -> bool:
        return token == EOS


def compiler(vocab_size: int = 257, eos_ids: Sequence[int] = (EOS,), **vocabulary: Any) -> ConstraintCompiler:
    return ConstraintCompiler(ByteVocabulary(**vocabulary), vocab_size, eos_ids)


def allowed_ids(state: ConstraintState) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(state.allowed().view(np.uint8), bitorder="little")).tolist())


def accepts(constraint: Constraint, text: str) -> bool:
    """Whether a whole text may be written byte by byte and end there."""
    state = constraint.start()
    for byte in text.encode():
        if state.complete or byte not in allowed_ids(state):
            return False
        state.accept(byte)
    return state.complete or EOS in allowed_ids(state)
