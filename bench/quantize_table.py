"""The table of docs/quantize.md: what each type makes of SmolLM2, in size, perplexity, divergence and speed.

Usage: python -m bench.quantize_table [MODEL] [--data FOLDER] [--folder FOLDER] [--windows N] [--calibration N]
                                      [--llama-cpp] [--types T …]
MODEL (the stored smollm2) is taken as F16. Each type is made twice, without and with an importance matrix from N
windows of WikiText-2's training text, and run by Puna on N windows of 512 tokens of its validation text. Perplexity is
over the second half of each window, as llama-perplexity has it; KL is the mean over all tokens, in nats, to the F16
model. ``--llama-cpp`` adds the perplexity of the file that llama-quantize makes, run by Puna, and the perplexity of
Puna's file, run by llama-perplexity. Files and figures stay in FOLDER and are not made again; speed is always measured
anew.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from puna import LLM
from puna.checkpoint import open_checkpoint
from puna.checkpoint.convert import convert
from puna.cli.llama_cpp import find_program
from puna.model.model import Model
from puna.ops.registry import make_ops
from puna.quantize import QuantizeSettings, quantize
from puna.quantize.calibration import Windows, divergence, log_probabilities, measure_importance, read_windows
from puna.quantize.imatrix import write_imatrix
from puna.quantize.mix import MIXES
from puna.store import resolve

ROOT = Path(__file__).resolve().parent.parent
ANSWER_TOKENS = 64


class Table:
    """The figures so far, in ``folder``."""

    def __init__(self, folder: Path, source: Path, windows: Windows, text: Path) -> None:
        self.folder, self.source, self.windows, self.text = folder, source, windows, text
        self._path = folder / "figures.json"
        self.figures: dict[str, dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._ops = make_ops()
        self._known = [log_probabilities(self._model(source), window) for window in windows]

    def note(self, kind: str, name: str, make: Any) -> None:
        row = self.figures.setdefault(kind, {})
        if name not in row:
            row[name] = make()
            self._path.write_text(json.dumps(self.figures, indent=1))
            print(kind, name, row[name], flush=True)

    def quality(self, path: Path) -> tuple[float, float]:
        """Perplexity and mean KL to the source."""
        model = self._model(path)
        losses, distances = [], []
        for known, window in zip(self._known, self.windows, strict=True):
            found = log_probabilities(model, window)
            half = len(window) // 2
            losses += (-found[np.arange(half, len(window) - 1), window[half + 1 :]]).tolist()
            distances.append(divergence(known, found))
        return float(np.exp(np.mean(losses))), float(np.mean(distances))

    def llama_perplexity(self, path: Path) -> float:
        command = [str(find_program("llama-perplexity")), "-m", str(path), "-f", str(self.text), "-c", "512"]
        command += ["--chunks", str(len(self.windows)), "-t", str(self._ops.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return float(re.search(r"PPL = ([\d.]+)", done.stdout + done.stderr)[1])

    def _model(self, path: Path) -> Model:
        checkpoint = open_checkpoint(path)
        return Model.bind(self._ops, checkpoint.config, checkpoint.tensors)


def speed(path: Path) -> float:
    """Tokens/s of one answer after a short prompt, the better of two."""
    with LLM.load(path, packed=False) as llm:
        answers = [llm.generate("Once upon a time", temperature=0, max_tokens=ANSWER_TOKENS) for _ in range(2)]
    return max((len(answer.token_ids) - 1) / answer.timings.decode_seconds for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "puna-quantize-table")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--types", nargs="*", default=list(MIXES))
    parser.add_argument("--llama-cpp", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source, imatrix = args.folder / "F16.gguf", args.folder / "imatrix.gguf"
    if not source.exists():
        convert(resolve(args.model).path, source, weight_type="F16")
    checkpoint = open_checkpoint(source)
    text, training = (args.data / "text" / name for name in ("wikitext2-valid.txt", "wikitext2_train_5k.txt"))
    if not imatrix.exists():
        windows = read_windows(checkpoint, training, args.calibration)
        write_imatrix(imatrix, measure_importance(checkpoint, make_ops(), windows, training.name))
    table = Table(args.folder, source, read_windows(checkpoint, text, args.windows), text)
    paths = {"F16": source}
    table.note("F16", "plain", lambda: table.quality(source))
    for kind in args.types:
        plain, weighted, theirs = (args.folder / f"{kind}{suffix}.gguf" for suffix in ("", ".imatrix", ".llama.cpp"))
        paths[kind] = plain
        if not plain.exists():
            quantize(source, plain, QuantizeSettings(mix=kind))
        if not weighted.exists():
            quantize(source, weighted, QuantizeSettings(mix=kind, imatrix=imatrix))
        table.note(kind, "plain", lambda path=plain: table.quality(path))
        table.note(kind, "imatrix", lambda path=weighted: table.quality(path))
        if args.llama_cpp:
            if not theirs.exists():
                command = [str(find_program("llama-quantize")), str(source), str(theirs), kind]
                subprocess.run(command, check=True, capture_output=True)
            table.note(kind, "llama.cpp's file", lambda path=theirs: table.quality(path))
            table.note(kind, "in llama.cpp", lambda path=plain: table.llama_perplexity(path))
    numbers = sum(int(np.prod(weight.shape)) for weight in checkpoint.tensors.values())
    titles = ["type", "MB", "bits", "PPL", "KL", "PPL, imatrix", "KL, imatrix"]
    titles += ["PPL, llama.cpp's file", "PPL in llama.cpp", "tok/s"]
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    rows = []
    for kind, path in paths.items():
        row = table.figures[kind]
        size, fast = path.stat().st_size, speed(path)
        ppl, kl = row["plain"]
        cells = [kind, f"{size / 1e6:.0f}", f"{8 * size / numbers:.2f}", f"{ppl:.3f}", f"{kl:.4f}"]
        cells += [f"{row['imatrix'][0]:.3f}", f"{row['imatrix'][1]:.4f}"] if "imatrix" in row else ["", ""]
        cells += [f"{row[name][0]:.3f}" if name in row else "" for name in ["llama.cpp's file"]]
        cells += [f"{row['in llama.cpp']:.3f}" if "in llama.cpp" in row else "", f"{fast:.0f}"]
        print("| " + " | ".join(cells) + " |")
        rows.append(row | {"type": kind, "bytes": size, "tokens_per_second": fast})
    print(json.dumps({"bench": "quantize_table", "windows": args.windows, "rows": rows}))


if __name__ == "__main__":
    main()
