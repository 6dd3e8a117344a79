"""How fast and how large training is, beside transformers with PEFT: the same model, documents, dtype and optimizer.

Usage: python -m bench.train MODEL [--method lora,full] [--documents equal,mixed] [--dtype float32,bfloat16]
                                   [--tokens N] [--steps N] [--rounds N] [--threads N] [--json FILE]
MODEL is a Hugging Face folder. Each figure comes from a process of its own, and the two programs take turns.

- Puna: `Trainer` over `LlamaModule`, documents packed in one sequence. bfloat16 computes with float32 masters.
- transformers: its model with sdpa attention, LoRA by PEFT, torch's fused AdamW, gradients clipped. A document is a row
  of the batch, padded to the longest. bfloat16 is autocast, over float32 weights where they are trained, over the
  file's where they are frozen, as `Trainer(bf16=True)` does it.

`equal` documents have 256 tokens, all trained. `mixed` ones have from 16 to 384, of which the first third, like the
prompt of a chat, is not trained. Tokens per second count real tokens, of the median step behind the first one; memory
is the process's highest resident set (VmHWM) at the end of the last step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PROGRAMS = ("puna", "transformers")
RANK, ALPHA, RATE, CLIP = 16, 32, 1e-4, 1.0


@dataclass(frozen=True)
class Pack:
    ids: np.ndarray[Any, np.dtype[np.int32]]
    trained: np.ndarray[Any, np.dtype[np.bool_]]
    seq_starts: np.ndarray[Any, np.dtype[np.int32]]


def packs(kind: str, tokens: int, vocabulary: int) -> Iterator[Pack]:
    """Endless random documents: about ``tokens`` in each pack."""
    rng = np.random.default_rng(0)
    while True:
        lengths: list[int] = []
        while sum(lengths) < tokens:
            lengths.append(256 if kind == "equal" else int(np.clip(rng.lognormal(np.log(100), 0.7), 16, 384)))
        starts = np.cumsum([0, *lengths]).astype(np.int32)
        place = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
        trained = place >= (0 if kind == "equal" else np.repeat(lengths, lengths) // 3)
        yield Pack(rng.integers(0, vocabulary, starts[-1]).astype(np.int32), trained, starts)


class Steps:
    """A stream of packs that ends, and when each was asked for."""

    def __init__(self, source: Iterator[Pack], count: int) -> None:
        self.source, self.left = source, count

    def __next__(self) -> Pack:
        if self.left == 0:
            raise StopIteration
        self.left -= 1
        return next(self.source)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


def run_puna(args: argparse.Namespace) -> dict[str, float]:
    import torch

    from puna.checkpoint import open_checkpoint
    from puna.ops.torch_ops import TorchOps
    from puna.train.module import Full, LlamaModule, LoRA
    from puna.train.trainer import NextToken, Settings, StepReport, Trainer

    checkpoint = open_checkpoint(args.model)
    method = LoRA(rank=RANK, alpha=ALPHA) if args.method == "lora" else Full()
    ops = TorchOps(getattr(torch, args.dtype))
    module = LlamaModule(ops, checkpoint.config, checkpoint.tensors, method)
    stream = Steps(packs(args.documents, args.tokens, checkpoint.config.vocab_size), args.steps)
    settings = Settings(steps=args.steps, learning_rate=RATE, clip=CLIP, save_every=1 << 30)
    clock, memory = [time.perf_counter()], 0

    def on_step(report: StepReport) -> None:
        nonlocal memory
        clock.append(time.perf_counter())
        memory = peak_memory()

    with tempfile.TemporaryDirectory() as folder:
        Trainer(module, NextToken(), stream, settings, Path(folder)).run(on_step)
    return result(args, checkpoint.config.vocab_size, clock, memory)


def run_transformers(args: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    half = args.dtype == "bfloat16"
    frozen_dtype = torch.bfloat16 if half and args.method == "lora" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=frozen_dtype)
    if args.method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    source = packs(args.documents, args.tokens, model.config.vocab_size)
    clock = [time.perf_counter()]
    for _ in range(args.steps):
        ids, mask, labels = padded(next(source))
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.append(time.perf_counter())
    return result(args, model.config.vocab_size, clock, peak_memory())


def padded(pack: Pack) -> tuple[Any, Any, Any]:
    """Ids, mask of attention and labels, [documents, longest]."""
    import torch

    lengths = np.diff(pack.seq_starts)
    inside = np.arange(lengths.max()) < lengths[:, None]
    ids, labels = np.zeros(inside.shape, np.int64), np.full(inside.shape, -100, np.int64)
    ids[inside] = pack.ids
    labels[inside] = np.where(pack.trained, pack.ids, -100)
    return torch.from_numpy(ids), torch.from_numpy(inside.astype(np.int64)), torch.from_numpy(labels)


def result(args: argparse.Namespace, vocabulary: int, clock: list[float], memory: int) -> dict[str, float]:
    source = packs(args.documents, args.tokens, vocabulary)
    counts = [len(next(source).ids) for _ in range(args.steps)]
    speeds = [count / seconds for count, seconds in zip(counts[1:], np.diff(clock)[1:], strict=True)]
    return {"tokens_per_second": statistics.median(speeds), "peak_bytes": memory}


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def in_process(program: str, arguments: list[str], threads: int) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bench.train", *arguments, "--program", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", default="lora,full")
    parser.add_argument("--documents", default="equal,mixed")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step, or a few more")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        print(json.dumps((run_puna if args.program == "puna" else run_transformers)(args)))
        return
    print("| training | documents | dtype | Puna, tokens/s | transformers | ratio | Puna, GB | transformers | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for method in args.method.split(","):
        for documents in args.documents.split(","):
            for dtype in args.dtype.split(","):
                options = ["--method", method, "--documents", documents, "--dtype", dtype]
                options += ["--tokens", str(args.tokens), "--steps", str(args.steps)]
                rows.append({"method": method, "documents": documents, "dtype": dtype})
                rows[-1] |= measure([args.model, *options], args.rounds, args.threads)
                print(table_row(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args), "rows": rows}, indent=1, default=str) + "\n")


def measure(arguments: list[str], rounds: int, threads: int) -> dict[str, Any]:
    """Medians over rounds; the ratio of speeds is the median of the rounds' own."""
    runs: dict[str, list[dict[str, float]]] = {program: [] for program in PROGRAMS}
    for number in range(rounds):
        for program in PROGRAMS if number % 2 == 0 else PROGRAMS[::-1]:
            runs[program].append(in_process(program, arguments, threads))
    found: dict[str, Any] = {
        program: {key: statistics.median(run[key] for run in runs[program]) for key in runs[program][0]}
        for program in PROGRAMS
    }
    pairs = list(zip(*(runs[program] for program in PROGRAMS), strict=True))
    for key in ("tokens_per_second", "peak_bytes"):
        found[f"{key}_ratio"] = statistics.median(ours[key] / theirs[key] for ours, theirs in pairs)
    return found


def table_row(row: Mapping[str, Any]) -> str:
    speeds = [f"{row[program]['tokens_per_second']:.0f}" for program in PROGRAMS]
    sizes = [f"{row[program]['peak_bytes'] / 1e9:.2f}" for program in PROGRAMS]
    cells = [row["method"], row["documents"], row["dtype"], *speeds, f"{row['tokens_per_second_ratio']:.2f}"]
    return "| " + " | ".join([*cells, *sizes, f"{row['peak_bytes_ratio']:.2f}"]) + " |"


if __name__ == "__main__":
    main()
