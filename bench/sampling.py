"""Speed of choosing tokens: milliseconds a step for many rows over a large vocabulary, with and without Python's share.

    python bench/sampling.py --rows 32 --vocabulary 128256 --threads 2

The logits are normal with a few likely tokens, as a model's are. `kernel` is the native call; `step` adds the making of
the rows from requests (puna/engine/sampler.py) and of the results. Least of many runs. Prints a table, then one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import time
from array import array
from collections.abc import Callable

import numpy as np

from puna.engine.request import Request, SamplingParams
from puna.engine.sampler import Sampler
from puna.ops.native_ops import NativeOps

CASES: dict[str, dict[str, float | int]] = {
    "greedy": {"temperature": 0.0},
    "top-k 40, top-p 0.9, t 0.8": {"temperature": 0.8, "top_k": 40, "top_p": 0.9},
    "the same, repeat penalty 1.1": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "repeat_penalty": 1.1},
    "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "plain": {"temperature": 1.0},
    "plain, t 0.7": {"temperature": 0.7},
    "greedy, 20 log probabilities": {"temperature": 0.0, "top_logprobs": 20},
}
RUNS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--isa")
    options = parser.parse_args()

    ops = NativeOps(options.threads, options.isa)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (options.rows, options.vocabulary)).astype(np.float32)
    logits[:, :20] += rng.normal(8, 2, (options.rows, 20)).astype(np.float32)
    prompt = array("i", rng.integers(0, options.vocabulary, 500).tolist())

    results = {}
    print(f"{options.rows} rows of {options.vocabulary}, {ops.threads} threads, {ops.isa}")
    print(f"{'ms a step':34}{'kernel':>10}{'step':>10}")
    for name, fields in CASES.items():
        params = SamplingParams(**{"top_k": 0, "top_p": 1.0, **fields})  # type: ignore[arg-type]
        samplers = [Sampler(Request(prompt.tolist(), params), options.vocabulary) for _ in range(options.rows)]
        rows = [sampler.row(prompt, 3, None) for sampler in samplers]

        def step(samplers: list[Sampler] = samplers) -> None:
            ops.sample(logits, [sampler.row(prompt, 3, None) for sampler in samplers])

        kernel = least_seconds(lambda rows=rows: ops._native.sample(logits, rows))  # type: ignore[misc]
        results[name] = {"kernel_ms": 1e3 * kernel, "step_ms": 1e3 * least_seconds(step)}
        print(f"{name:34}{results[name]['kernel_ms']:10.3f}{results[name]['step_ms']:10.3f}", flush=True)
    print(
        json.dumps({"rows": options.rows, "vocabulary": options.vocabulary, "threads": ops.threads, "results": results})
    )


def least_seconds(function: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
