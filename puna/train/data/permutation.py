"""A shuffled order of any number of rows that takes no memory: a permutation computed element by element.

A Feistel network is a bijection of the numbers of 2k bits whatever its round function is; applied again until the
result is below n, it is one of the first n (cycle walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
2002). The round function is the finalizer of splitmix64 (Steele et al., 2014).
"""

from __future__ import annotations

_ROUNDS = 6
_MASK = (1 << 64) - 1


class Permutation:
    """``permutation[0]`` … ``permutation[size - 1]`` are 0 … size - 1, in an order that ``seed`` and ``epoch`` give."""

    def __init__(self, size: int, seed: int, epoch: int = 0) -> None:
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1
        start = _mix(_mix(seed & _MASK) ^ epoch)
        self._keys = [_mix(start + number) for number in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.size:
            raise IndexError(place)
        while True:
            left, right = place >> self._half, place & self._low
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & self._low)
            place = left << self._half | right
            if place < self.size:
                return place


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
