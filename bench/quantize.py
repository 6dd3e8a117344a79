"""How long a quantization takes and how much memory it needs, beside llama.cpp's.

Usage: python -m bench.quantize SOURCE.gguf [--type Q4_K_M] [--threads N] [--runs N]
``puna quantize`` and ``llama-quantize`` run in turn on the same file, each as a program of its own, and write to the
same folder; the source is read once before, so that it is in the system's page cache for both. Peak memory is the
kernel's figure (ru_maxrss), which counts mapped file pages. Prints a table of the fastest runs, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from puna.cli.llama_cpp import find_program


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in MB."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    text = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed: {text.decode()[-300:]}")
    return time.perf_counter() - started, usage.ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    args = parser.parse_args()
    with args.source.open("rb") as file:
        while file.read(1 << 24):
            pass
    with tempfile.TemporaryDirectory(dir=args.source.parent) as folder:
        ours, theirs = f"{folder}/ours.gguf", f"{folder}/theirs.gguf"
        options = ["--type", args.type, "--threads", str(args.threads), "--force"]
        commands = {
            "puna": [sys.executable, "-m", "puna", "quantize", str(args.source), ours, *options],
            "llama.cpp": [str(find_program("llama-quantize")), str(args.source), theirs, args.type, str(args.threads)],
        }
        runs = {name: [] for name in commands}
        for _ in range(args.runs):
            for name, command in commands.items():
                runs[name].append(run(command))
        sizes = {"puna": os.path.getsize(ours), "llama.cpp": os.path.getsize(theirs)}
    print(f"{args.source.name} to {args.type}, {args.threads} threads")
    for name, measured in runs.items():
        seconds, memory = min(measured)
        print(f"{name:12} {seconds:8.1f} s {memory:8.0f} MB peak {sizes[name]:>16,} bytes")
    figures = {name: {"seconds": min(m)[0], "peak_mb": min(m)[1], "bytes": sizes[name]} for name, m in runs.items()}
    print(json.dumps({"bench": "quantize", "type": args.type, "threads": args.threads} | figures))


if __name__ == "__main__":
    main()
