"""What LoRA adapters cost: a decode step and a prefill of several sequences, with and without.

Usage: python bench/adapters.py MODEL [--rank N] [--sequences N] [--steps N] [--runs N] [--threads N]
Random adapters of all seven linear layers of each block. Measured in turn: without adapters, with one that all
sequences share, with one for each sequence. Prints a table of medians, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from puna import LLM
from puna.engine import Request, SamplingParams
from puna.model.shapes import tensor_shapes
from puna.tensor import Adapter, LowRank

PROMPT_TOKENS = 64


def random_adapter(llm: LLM, rank: int, seed: int) -> Adapter:
    rng = np.random.default_rng(seed)
    return Adapter(
        {
            name: LowRank(
                rng.standard_normal((rank, shape[1]), np.float32),
                rng.standard_normal((shape[0], rank), np.float32),
                1e-4,
            )
            for name, shape in tensor_shapes(llm.config).items()
            if name.endswith("_proj.weight")
        }
    )


def measure(llm: LLM, adapters: list[str | None], steps: int, salt: str) -> tuple[float, float]:
    """Seconds of the prefill of all prompts, and of one decode step."""
    params = SamplingParams(temperature=0, max_tokens=steps + 8)
    streams = [
        llm.engine.submit(Request([100 + n] * PROMPT_TOKENS, params, cache_salt=f"{salt} {n}", adapter=adapter))
        for n, adapter in enumerate(adapters)
    ]
    started = time.perf_counter()
    while any(stream.sequence.behind != 1 or stream.sequence.num_generated < 1 for stream in streams):
        llm.engine.step()
    prefill = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(steps):
        llm.engine.step()
    decode = (time.perf_counter() - started) / steps
    for stream in streams:
        llm.engine.cancel(stream.id)
    return prefill, decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    llm = LLM.load(args.model, threads=args.threads, context_length=PROMPT_TOKENS + args.steps + 16)
    names = [f"adapter {n}" for n in range(args.sequences)]
    cases: dict[str, list[str | None]] = {
        "no adapter": [None] * args.sequences,
        "one adapter": [names[0]] * args.sequences,
        "an adapter each": list(names),
    }
    for n, name in enumerate(names):
        llm.engine.load_adapter(name, random_adapter(llm, args.rank, n))
    figures: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
    for run in range(args.runs + 1):
        for case, adapters in cases.items():
            found = measure(llm, adapters, args.steps, f"{run} {case}")
            if run:  # the first one warms up
                figures[case].append(found)
    medians = {
        case: [1e3 * statistics.median(column) for column in zip(*runs, strict=True)] for case, runs in figures.items()
    }
    print(f"{args.sequences} sequences, rank {args.rank}, {llm.adapters[names[0]].nbytes / 1e6:.1f} MB an adapter\n")
    print("| | prefill, ms | decode step, ms |\n|---|---|---|")
    for case, (prefill, decode) in medians.items():
        print(f"| {case} | {prefill:.0f} | {decode:.2f} |")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
