"""Whether one file has one perplexity in Puna and in llama.cpp: the second table of docs/quantize.md.

Usage: python -m bench.same_perplexity [MODEL] [--text FILE] [--folder FOLDER] [--windows N] [--types T …]
MODEL (the stored smollm2) is taken as F16 and quantized to each type. Both programs read N windows of 512 tokens and
score the second half of each: first the file's numbers as float32 (no rounding of inputs, a float32 cache), then the
file as it is run. The standard error is that of the mean change that rounded inputs make to a token's loss in Puna.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from puna.checkpoint import open_checkpoint
from puna.checkpoint.convert import convert
from puna.cli.llama_cpp import find_program
from puna.model.model import Model
from puna.ops.registry import make_ops
from puna.quantize import QuantizeSettings, quantize
from puna.quantize.calibration import log_probabilities, read_windows
from puna.store import resolve

ROOT = Path(__file__).resolve().parent.parent
EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")


def losses(path: Path, text: Path, windows: int) -> NDArray[np.float64]:
    """Puna's loss of each scored token, in nats."""
    checkpoint = open_checkpoint(path)
    model = Model.bind(make_ops(), checkpoint.config, checkpoint.tensors)
    parts = []
    for window in read_windows(checkpoint, text, windows):
        found, half = log_probabilities(model, window), len(window) // 2
        parts.append(-found[np.arange(half, len(window) - 1), window[half + 1 :]].astype(np.float64))
    return np.concatenate(parts)


def llama_perplexity(path: Path, text: Path, windows: int, options: tuple[str, ...] = ()) -> float:
    command = [str(find_program("llama-perplexity")), "-m", str(path), "-f", str(text), "-c", "512"]
    done = subprocess.run([*command, "--chunks", str(windows), *options], capture_output=True, text=True, check=True)
    return float(re.search(r"PPL = ([\d.]+)", done.stdout + done.stderr)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "data" / "text" / "wikitext2-valid.txt")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "puna-same-perplexity")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--types", nargs="*", default=["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_XS"])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source = args.folder / "F16.gguf"
    if not source.exists():
        convert(resolve(args.model).path, source, weight_type="F16")
    rows = []
    print("| type | Puna, float32 | llama.cpp, float32 | difference | Puna | llama.cpp | difference |")
    print(f"|{'---|' * 7}")
    for kind in args.types:
        path, exact = args.folder / f"{kind}.gguf", args.folder / f"{kind}.F32.gguf"
        if not path.exists():
            quantize(source, path, QuantizeSettings(mix=kind))
        convert(path, exact, weight_type="F32", overwrite=True)
        plain, rounded = losses(exact, args.text, args.windows), losses(path, args.text, args.windows)
        theirs = (
            llama_perplexity(exact, args.text, args.windows, EXACT),
            llama_perplexity(path, args.text, args.windows),
        )
        exact.unlink()
        pairs = list(zip((float(np.exp(part.mean())) for part in (plain, rounded)), theirs, strict=True))
        cells = [f"{ours:.4f} | {other:.4f} | {100 * (ours / other - 1):+.3f} %" for ours, other in pairs]
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
        error = float((rounded - plain).std() / np.sqrt(len(plain)))
        rows.append({"type": kind, "float32": pairs[0], "as_run": pairs[1], "standard_error": error})
    print(json.dumps({"bench": "same_perplexity", "windows": args.windows, "rows": rows}))


if __name__ == "__main__":
    main()
