"""Token ids with a loss mask, cut to a length, and packed into sequences."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Truncation = Literal["drop", "cut_left", "cut_right", "split"]


@dataclass(frozen=True)
class Tokens:
    """One document: ``ids`` int32[T], and ``trained`` bool[T], whether token t is a target, to be predicted from those
    before it. The first token never is: nothing is before it."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]

    @classmethod
    def of(cls, ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> Tokens:
        """``spans`` are the (start, end) that are trained."""
        trained = np.zeros(len(ids), np.bool_)
        for start, end in spans:
            trained[start:end] = True
        trained[:1] = False
        return cls(np.asarray(ids, np.int32), trained)

    def __len__(self) -> int:
        return len(self.ids)


def truncate(tokens: Tokens, length: int, policy: Truncation, bos: int | None) -> list[Tokens]:
    """A document as documents of at most ``length`` tokens, of which each has something to learn.

    ``drop`` leaves a longer one out; ``cut_right`` keeps its beginning; ``cut_left`` its end, behind ``bos`` where the
    document began with that; ``split`` makes several of it, one after the other.
    """
    if len(tokens) <= length:
        parts = [tokens]
    elif policy == "drop":
        parts = []
    elif policy == "cut_right":
        parts = [_slice(tokens, 0, length)]
    elif policy == "cut_left":
        parts = [_end(tokens, length, bos)]
    else:
        parts = [_slice(tokens, at, at + length) for at in range(0, len(tokens), length)]
    return [part for part in parts if part.trained.any()]


def _slice(tokens: Tokens, start: int, end: int) -> Tokens:
    trained = tokens.trained[start:end].copy()
    trained[:1] = False
    return Tokens(tokens.ids[start:end], trained)


def _end(tokens: Tokens, length: int, bos: int | None) -> Tokens:
    if bos is None or tokens.ids[0] != bos or length < 2:
        return _slice(tokens, len(tokens) - length, len(tokens))
    rest = slice(len(tokens) - length + 1, len(tokens))
    return Tokens(np.concatenate([tokens.ids[:1], tokens.ids[rest]]), np.concatenate([[False], tokens.trained[rest]]))


@dataclass(frozen=True)
class Packed:
    """Several documents in one sequence: ``ids`` int32[T] and ``trained`` bool[T] as in ``Tokens``.

    Document d owns tokens ``seq_starts[d]:seq_starts[d + 1]`` (int32[D + 1]). No token may attend to another document.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    seq_starts: NDArray[np.int32]

    @property
    def positions(self) -> NDArray[np.int32]:
        """int32[T], from 0 in each document."""
        lengths = np.diff(self.seq_starts)
        return np.arange(len(self.ids), dtype=np.int32) - np.repeat(self.seq_starts[:-1], lengths)

    @property
    def documents(self) -> list[Tokens]:
        """Taken apart again."""
        return [
            Tokens(self.ids[start:end], self.trained[start:end])
            for start, end in zip(self.seq_starts[:-1], self.seq_starts[1:], strict=True)
        ]


def pack(documents: Sequence[Tokens], length: int) -> list[Packed]:
    """Sequences of at most ``length`` tokens, in which every document is whole: the longest first, each into the
    fullest sequence that has room for it (best-fit decreasing). Raises ValueError for a document that is too long."""
    longest = max((len(document) for document in documents), default=0)
    if longest > length:
        raise ValueError(f"a document of {longest} tokens does not fit into sequences of {length}")
    rooms: list[tuple[int, int]] = []  # (room left, number of the sequence), sorted
    bins: list[list[int]] = []
    for number in sorted(range(len(documents)), key=lambda number: (-len(documents[number]), number)):
        size = len(documents[number])
        at = bisect_left(rooms, (size, -1))
        if at < len(rooms):
            room, place = rooms.pop(at)
        else:
            room, place = length, len(bins)
            bins.append([])
        bins[place].append(number)
        insort(rooms, (room - size, place))
    # Sequences in the documents' order, for it was shuffled, and the longest are not to come first.
    return [concatenate([documents[number] for number in numbers]) for numbers in sorted(map(sorted, bins))]


def concatenate(documents: Sequence[Tokens]) -> Packed:
    """One sequence of all the documents, at least one, in their order."""
    return Packed(
        np.concatenate([document.ids for document in documents]),
        np.concatenate([document.trained for document in documents]),
        np.cumsum([0, *map(len, documents)], dtype=np.int32),
    )
