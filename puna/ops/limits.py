"""What this machine can do at best, measured: the floors that the speed of a model is held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import puna._native as _native
from puna.ops.native_ops import NativeOps

READ_BYTES = 1 << 28  # well beyond any cache that one process gets to itself
REPEATS = 5
TASK_SECONDS = 0.02


@dataclass(frozen=True)
class Limits:
    """Memory read in GB/s (10^9 bytes); int8 and float32 products in Gop/s, where a multiply-add is two operations.

    They hold for ``threads`` threads running the instructions of ``isa``.
    """

    isa: str
    threads: int
    read_gb_per_s: float
    int8_gop_per_s: float
    float32_gop_per_s: float


def measure_limits(threads: int | None = None, isa: str | None = None) -> Limits:
    """Takes about half a second; the best of a few short runs counts. Arguments as in NativeOps."""
    ops = NativeOps(threads, isa)
    native = _native.Native(ops.threads, ops.isa)
    raw = np.ones(READ_BYTES + 64, np.uint8)
    start = -raw.ctypes.data % 64
    data = raw[start : start + READ_BYTES]
    return Limits(
        ops.isa,
        ops.threads,
        READ_BYTES / min(_seconds(native.read_memory, data) for _ in range(REPEATS)) / 1e9,
        _operations_per_second(native.multiply_int8) / 1e9,
        _operations_per_second(native.multiply_float32) / 1e9,
    )


def _operations_per_second(multiply: Callable[[int], int]) -> float:
    rounds = 1000
    while (seconds := _seconds(multiply, rounds)) < TASK_SECONDS / 4:
        rounds *= 2
    rounds = max(1, int(rounds * TASK_SECONDS / seconds))
    operations = multiply(rounds)
    return operations / min(_seconds(multiply, rounds) for _ in range(REPEATS))


def _seconds(work: Callable[[Any], Any], argument: Any) -> float:
    start = time.perf_counter()
    work(argument)
    return time.perf_counter() - start
