"""The order in which examples are visited: shuffled anew in every epoch, mixed by weight, resumable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from puna.errors import DataError
from puna.train.data.permutation import Permutation


class Order:
    """An iterator of (source, number): which example of which source comes next.

    Without ``weights`` the sources are one set, visited once an epoch, ``epochs`` times (None: without end). With
    weights it is endless, and the source that lags most behind its share is next, so that none is ever a whole example
    ahead; a small source then comes round more often. ``state`` is all that is needed to go on. Raises DataError for
    sizes or weights that give nothing to visit.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
    ) -> None:
        self.sizes = list(sizes)
        if not self.sizes or min(self.sizes) < 0 or sum(self.sizes) == 0:
            raise DataError(f"there are no examples to train on: the sizes of the data sets are {self.sizes}")
        if weights is not None:
            _check_weights(weights, self.sizes)
            weights = [weight / sum(weights) for weight in weights]
        self._weights = weights
        self._seed = seed
        self._shuffle = shuffle
        self._limit = None if epochs is None or weights is not None else epochs * sum(self.sizes)
        self._drawn = [0] * (1 if weights is None else len(self.sizes))
        self._permutations: dict[int, tuple[int, Permutation]] = {}

    @property
    def drawn(self) -> int:
        """How many examples have been visited."""
        return sum(self._drawn)

    @property
    def epoch(self) -> float:
        """How many times all of the data has been visited; with weights, by the number of examples."""
        return self.drawn / sum(self.sizes)

    def __iter__(self) -> Order:
        return self

    def __next__(self) -> tuple[int, int]:
        if self._weights is None:
            if self._limit is not None and self._drawn[0] >= self._limit:
                raise StopIteration
            number = self._next_of(0, sum(self.sizes))
            source = 0
            while number >= self.sizes[source]:
                number -= self.sizes[source]
                source += 1
            return source, number
        total = self.drawn + 1
        lag = [weight * total - drawn for weight, drawn in zip(self._weights, self._drawn, strict=True)]
        source = lag.index(max(lag))
        return source, self._next_of(source, self.sizes[source])

    def state(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        return {
            "epoch": int(self.epoch),
            "position": self.drawn % sum(self.sizes),
            "drawn": list(self._drawn),
            "sizes": list(self.sizes),
            "seed": self._seed,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken. Raises DataError when that was another order."""
        here = self.state()
        for name in ("sizes", "seed"):
            if state.get(name) != here[name]:
                raise DataError(
                    f"the run was begun with the data's {name} {state.get(name)!r}, which now is {here[name]!r}; "
                    "continue it with the same data and seed, or begin anew"
                )
        drawn = state.get("drawn")
        if not isinstance(drawn, list) or len(drawn) != len(self._drawn) or not all(isinstance(n, int) for n in drawn):
            raise DataError("the state of the data is not that of this mixture; continue with the same weights")
        self._drawn = list(drawn)

    def _next_of(self, source: int, size: int) -> int:
        epoch, position = divmod(self._drawn[source], size)
        self._drawn[source] += 1
        if not self._shuffle:
            return position
        cached = self._permutations.get(source)
        if cached is None or cached[0] != epoch:
            # Each source has a seed of its own, lest equal sizes give equal orders.
            cached = self._permutations[source] = (epoch, Permutation(size, self._seed + (source << 32), epoch))
        return cached[1][position]


def _check_weights(weights: Sequence[float], sizes: Sequence[int]) -> None:
    if len(weights) != len(sizes):
        raise DataError(f"there are {len(sizes)} data sets but {len(weights)} weights; give one for each")
    if any(not 0 <= weight < float("inf") for weight in weights) or sum(weights) == 0:
        raise DataError(f"weights must be numbers of 0 or more, and not all 0, found {list(weights)}")
    for weight, size in zip(weights, sizes, strict=True):
        if weight > 0 and size == 0:
            raise DataError(f"a data set without examples has the weight {weight:g}; take it out")
