"""A stream of whole answers that are compared (preferences) or labelled (KTO), some examples in each micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from puna.errors import DataError
from puna.train.data.examples import Example, Labelled, Preference
from puna.train.data.order import Order
from puna.train.data.tokens import Packed, Tokens, concatenate, truncate


@dataclass(frozen=True)
class Answers:
    """Each document of ``packed`` is a prompt with its answer, which alone is trained; ``desirable`` bool[D] says
    whether it is a good one. Of a preference, the chosen answer comes first and the rejected next."""

    packed: Packed
    desirable: NDArray[np.bool_]


class AnswerStream:
    """``count`` examples at a time, in the order's order.

    ``example`` gives what (source, number) says, ``render`` its documents (``Renderer.documents``). A document of more
    than ``length`` tokens falls to ``truncation``; where nothing is left of an answer, the whole example is left out
    and counted in ``left_out``. Raises DataError when none is left, or an example is neither a preference nor labelled.
    """

    def __init__(
        self,
        order: Order,
        example: Callable[[int, int], Example],
        render: Callable[[Example], list[Tokens]],
        *,
        count: int,
        length: int,
        truncation: Literal["drop", "cut_left", "cut_right"],
        bos: int | None,
    ) -> None:
        self.left_out = 0
        self._order, self._example, self._render, self._count = order, example, render, count
        self._length, self._truncation, self._bos = length, truncation, bos

    def __iter__(self) -> Iterator[Answers]:
        return self

    def __next__(self) -> Answers:
        documents: list[Tokens] = []
        desirable: list[bool] = []
        found = fruitless = 0
        while found < self._count and (place := next(self._order, None)) is not None:
            example = self._example(*place)
            whole = self._render(example)
            kept = [part for one in whole for part in truncate(one, self._length, self._truncation, self._bos)]
            if len(kept) < len(whole):
                self.left_out += 1
                fruitless += 1
                if fruitless >= sum(self._order.sizes):
                    raise DataError(f"no answer fits into {self._length} tokens; train with longer sequences")
                continue
            found, fruitless = found + 1, 0
            documents += kept
            desirable += _labels(example)
        if not documents:
            raise StopIteration
        return Answers(concatenate(documents), np.array(desirable, np.bool_))

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {"order": self._order.state(), "left_out": self.left_out}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises DataError when that was of other data."""
        self._order.restore(state["order"])
        self.left_out = state["left_out"]


def _labels(example: Example) -> list[bool]:
    if isinstance(example, Preference):
        return [True, False]
    if isinstance(example, Labelled):
        return [example.desirable]
    raise DataError("this objective compares answers; give it rows with chosen and rejected, or with a label")
