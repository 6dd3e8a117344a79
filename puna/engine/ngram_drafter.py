"""Prompt lookup (Saxena 2023): what followed the last few tokens when they last occurred, in prompt or answer."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf

from puna.engine.speculation import Limits, Lookahead, Speculation

SIZES = (6, 4, 3, 2)  # tokens that must match, longest first


class NgramDrafter:
    """Keeps an index for each sequence; a new token costs the same however long the context is."""

    def __init__(self, options: Speculation, limits: Limits) -> None:
        self._indexes: dict[int, NgramIndex] = {}

    def propose(self, lookaheads: SequenceOf[Lookahead]) -> None:
        for look in lookaheads:
            index = self._indexes.setdefault(look.sequence.id, NgramIndex())
            tokens = look.sequence.tokens
            place = index.find(tokens)
            if place is None:
                continue
            # A repetition may go on for longer than what is there of it: then the draft copies from itself.
            period = len(tokens) - place
            while look.extend(tokens[place] if place < len(tokens) else look.draft[-period]):
                place += 1

    def release(self, sequence_id: int) -> None:
        self._indexes.pop(sequence_id, None)

    def check_idle(self) -> None:
        assert not self._indexes


class NgramIndex:
    """Where each group of tokens was last seen: the place after it."""

    def __init__(self) -> None:
        self._after: dict[bytes, int] = {}
        self._indexed = 0
        self._found: int | None = None

    def find(self, tokens: array[int]) -> int | None:
        """The place after an earlier occurrence of the last tokens; None when there is none.

        ``tokens`` are those of the call before, and more.
        """
        after = self._after
        while self._indexed < len(tokens):
            end = self._indexed = self._indexed + 1
            self._found = None
            for size in SIZES:
                if size <= end:
                    key = tokens[end - size : end].tobytes()
                    seen = after.get(key)
                    if self._found is None:
                        self._found = seen
                    after[key] = end
        return self._found
