"""What is left of Puna's speed when another program takes one of its cores: prefill and decode, quiet and contended.

    python bench/contention.py MODEL --rounds 3

For each CPU of this process in turn, a busy loop is pinned to it while `puna bench` runs; rounds alternate with quiet
runs, and medians count. A fair share is (2n - 1) / 2n of the speed on n cores. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--gen-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    cpus = sorted(os.sched_getaffinity(0))
    runs: dict[str, list[tuple[float, float]]] = {"quiet": [], **{f"cpu {cpu} taken": [] for cpu in cpus}}
    for _ in range(options.rounds):
        runs["quiet"].append(speeds(options))
        for cpu in cpus:
            with busy_loop(cpu):
                runs[f"cpu {cpu} taken"].append(speeds(options))

    medians = {
        name: tuple(statistics.median(column) for column in zip(*values, strict=True)) for name, values in runs.items()
    }
    ratios = {name: [m / q for m, q in zip(values, medians["quiet"], strict=True)] for name, values in medians.items()}
    print(f"{'':16}{'prefill tok/s':>15}{'decode tok/s':>15}{'prefill':>10}{'decode':>10}")
    for name, (prefill, decode) in medians.items():
        print(f"{name:16}{prefill:15.1f}{decode:15.1f}{ratios[name][0]:10.2f}{ratios[name][1]:10.2f}")
    print(json.dumps({"medians": medians, "ratios_to_quiet": ratios}))


@contextmanager
def busy_loop(cpu: int) -> Iterator[None]:
    """A process that does nothing but run on this CPU."""
    program = f"import os\nos.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def speeds(options: argparse.Namespace) -> tuple[float, float]:
    command = [sys.executable, "-m", "puna", "bench", options.model, "--json", "--runs", "3"]
    command += ["--prompt-tokens", str(options.prompt_tokens), "--gen-tokens", str(options.gen_tokens)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result["prefill_tokens_per_second"], result["decode_tokens_per_second"]


if __name__ == "__main__":
    main()
