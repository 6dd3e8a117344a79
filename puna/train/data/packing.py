"""An endless or finite stream of packed sequences, continued exactly from a small state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from puna.errors import DataError
from puna.train.data.order import Order
from puna.train.data.tokens import Packed, Tokens, Truncation, pack, truncate


class PackedStream:
    """Documents in the order's order, ``window`` examples at a time packed into sequences of at most ``length`` tokens.

    ``render`` gives the documents of (source, number). A document that is longer falls to ``truncation``; ``left_out``
    counts the documents of which nothing remained. ``state`` is the order's before the window that is being handed out,
    and how many of its sequences were. Raises DataError when not one example of the data is left after truncation.
    """

    def __init__(
        self,
        order: Order,
        render: Callable[[int, int], list[Tokens]],
        length: int,
        *,
        truncation: Truncation,
        bos: int | None,
        window: int = 256,
    ) -> None:
        self.left_out = self._left_out_before = 0
        self._order, self._render = order, render
        self._length, self._truncation, self._bos, self._size = length, truncation, bos, window
        self._window: list[Packed] = []
        self._begin = order.state()
        self._taken = 0

    def __iter__(self) -> Iterator[Packed]:
        return self

    def __next__(self) -> Packed:
        fruitless = 0
        while self._taken == len(self._window):
            before = self._order.drawn
            self._fill()
            if self._order.drawn == before:
                raise StopIteration
            fruitless += self._order.drawn - before
            if not self._window and fruitless >= sum(self._order.sizes):
                raise DataError(
                    f"no example fits into {self._length} tokens with something to learn; train with longer "
                    "sequences, or cut the examples"
                )
        self._taken += 1
        return self._window[self._taken - 1]

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"order": dict(self._begin), "taken": self._taken, "left_out": self._left_out_before}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises DataError when that was of other data."""
        self._order.restore(state["order"])
        taken, self.left_out = state["taken"], state["left_out"]
        self._fill()
        if not 0 <= taken <= len(self._window):
            raise DataError("the state of the data is not that of this data; continue with the same data and settings")
        self._taken = taken

    def _fill(self) -> None:
        self._begin, self._left_out_before, self._taken = self._order.state(), self.left_out, 0
        documents: list[Tokens] = []
        for _ in range(self._size):
            place = next(self._order, None)
            if place is None:
                break
            for document in self._render(*place):
                parts = truncate(document, self._length, self._truncation, self._bos)
                self.left_out += not parts
                documents += parts
        self._window = pack(documents, self._length)
