"""Speed of the linear kernels by weight type and instruction set: GB/s of weights for few rows, Gop/s for many.

Usage: python bench/kernels.py [--types Q4_0,Q8_0] [--isa avx512,avx2] [--threads N] [--rows N] [--columns K]
Few rows stream 200 MB of matrices from memory; compare with the machine's bandwidth. Many rows compute; an operation is
one multiplication or one addition. Prints a table, then one JSON line. Quote figures of a quiet machine only.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from puna import _native
from puna.ops.native_ops import NativeOps, NativeWeight
from puna.tensor import QUANT_TYPES, Weight
from puna.tensor.types import QuantType

STREAMED_BYTES = 200_000_000
FEW, MANY = (1, 2, 4, 8), 512
REPEATS = 7


def random_matrices(ops: NativeOps, type_name: str, rows: int, columns: int, count: int) -> list[NativeWeight]:
    """Matrices of random bytes with small scales; all have the same contents, in memory of their own."""
    kind = QUANT_TYPES[type_name]
    if kind.block_size == 1:
        data = kind.encode(np.random.default_rng(0).standard_normal((rows, columns), np.float32))
    else:  # codes of any value, and scales that are positive and not huge in whatever field holds them
        data = np.random.default_rng(0).integers(0, 0x30, (rows, kind.row_bytes(columns)), np.uint8)
    return [ops.weight(Weight(str(i), (rows, columns), kind, data)) for i in range(count)]


def seconds_each(ops: NativeOps, matrices: list[NativeWeight], tokens: int) -> float:
    """Median time of one product."""
    x = np.random.default_rng(1).standard_normal((tokens, matrices[0].shape[1]), np.float32)
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        for matrix in matrices:
            ops.linear(x, matrix)
        times.append((time.perf_counter() - start) / len(matrices))
    return float(np.median(times[1:]))


def _has_panels(kind: QuantType) -> bool:
    """Others (IQ1 to IQ3, TQ) are decoded and become panels of Q8_0."""
    return bool(_native.packed_bytes(kind.gguf_id, 16, 256))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(name for name, kind in QUANT_TYPES.items() if _has_panels(kind)))
    parser.add_argument("--isa", default=",".join(_native.instruction_sets()))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=2048)
    args = parser.parse_args()
    results = []
    print(f"{'isa':11}{'type':8}" + "".join(f"{f'{n} tok GB/s':>12}" for n in FEW) + f"{f'{MANY} tok Gop/s':>16}")
    for isa in args.isa.split(","):
        ops = NativeOps(args.threads, isa)
        for name in args.types.split(","):
            packed = _native.packed_bytes(QUANT_TYPES[name].gguf_id, args.rows, args.columns)
            matrices = random_matrices(ops, name, args.rows, args.columns, max(1, STREAMED_BYTES // packed))
            speeds = [packed / seconds_each(ops, matrices, tokens) / 1e9 for tokens in FEW]
            operations = 2 * args.rows * args.columns * MANY
            speeds.append(operations / seconds_each(ops, matrices[:2], MANY) / 1e9)
            print(f"{isa:11}{name:8}" + "".join(f"{s:12.1f}" for s in speeds[:-1]) + f"{speeds[-1]:16.0f}", flush=True)
            results.append(
                {"isa": isa, "type": name, "gb_per_s": dict(zip(FEW, speeds, strict=False)), "gop_per_s": speeds[-1]}
            )
    print(json.dumps({"threads": ops.threads, "rows": args.rows, "columns": args.columns, "results": results}))


if __name__ == "__main__":
    main()
