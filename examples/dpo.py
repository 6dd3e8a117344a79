"""Preferences: SmolLM2 learns from pairs of answers which to prefer, and is asked about pairs that it has not seen.

    python examples/dpo.py DATA [--out dpo.json]

DATA is the folder that holds finetune/hh-rlhf-harmless-base-test.jsonl.gz (human choices; contains offensive
text). Pairs of short dialogues are taken, 790 to learn from and 327 held out. The training is LoRA over the quantized
file, in bfloat16, about one epoch. Shown is the share of held-out pairs whose chosen answer has the greater implicit
reward, which is a coin's before training; and the margin between rewards.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from puna.checkpoint import open_checkpoint
from puna.ops.torch_ops import TorchOps
from puna.store import resolve
from puna.train.data.answers import AnswerStream
from puna.train.data.dataset import Subset, open_dataset
from puna.train.data.for_model import renderer_for
from puna.train.data.order import Order
from puna.train.module import LlamaModule, LoRA
from puna.train.objectives import knobs_of
from puna.train.trainer import Settings, StepReport, Trainer, measure

LENGTH, PAIRS = 384, 8
LONGEST = 1000  # characters of both dialogues of a pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--objective", default="dpo", choices=["dpo", "ipo", "orpo", "simpo"])
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=Path("dpo.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        learn(options, Path(folder))


def learn(options: argparse.Namespace, folder: Path) -> None:
    renderer = renderer_for(options.model)
    dataset = open_dataset(short_pairs(options.data, folder))
    to_train, held_out = (Subset(dataset, numbers) for numbers in dataset.checked().split(0.3))

    def stream(examples: Subset, epochs: int | None) -> AnswerStream:
        def example(source: int, number: int) -> Any:
            return examples[number]

        order = Order([len(examples)], seed=1, epochs=epochs)
        return AnswerStream(
            order, example, renderer.documents, count=PAIRS, length=LENGTH, truncation="cut_left", bos=None
        )

    validation = list(stream(held_out, 1))
    checkpoint = open_checkpoint(resolve(options.model).path)
    module = LlamaModule(TorchOps(torch.bfloat16), checkpoint.config, checkpoint.tensors, LoRA(rank=16, alpha=32))
    objective = knobs_of(options.objective, {}).objective(module)
    print(f"{options.objective}: {options.steps} steps of {PAIRS} pairs; {len(held_out)} pairs held out")

    def measured() -> dict[str, float]:
        found = measure(module, objective, validation)
        return {"loss": found["loss"], "accuracy": found["validation_accuracy"], "margin": found["validation_margin"]}

    def show(report: StepReport) -> None:
        if report.step % 5 == 0:
            seconds = time.perf_counter() - started
            accuracy = report.metrics["accuracy"]
            print(f"  step {report.step}, loss {report.loss:.3f}, accuracy {accuracy:.2f}, {seconds:.0f} s", flush=True)

    before, started = measured(), time.perf_counter()
    settings = Settings(options.steps, options.rate, warmup=max(1, options.steps // 10), save_every=10**6)
    Trainer(module, objective, stream(to_train, None), settings, folder).run(show)
    seconds, after = time.perf_counter() - started, measured()

    print(f"\nheld out{'loss':>10}{'accuracy':>10}{'margin':>10}")
    for name, row in (("before", before), ("after", after)):
        print(f"{name:8}{row['loss']:10.3f}{row['accuracy']:10.3f}{row['margin']:10.3f}")
    found = {"objective": options.objective, "steps": options.steps, "pairs_per_step": PAIRS, "seconds": seconds}
    options.out.write_text(json.dumps(found | {"before": before, "after": after}, indent=2) + "\n", encoding="utf-8")


def short_pairs(data: Path, folder: Path) -> Path:
    """The file of those rows whose two dialogues together are short."""
    with gzip.open(data / "finetune" / "hh-rlhf-harmless-base-test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [(row, json.loads(row)) for row in file]
    kept = [row for row, pair in rows if len(pair["chosen"]) + len(pair["rejected"]) < LONGEST]
    path = folder / "pairs.jsonl"
    path.write_text("".join(kept), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
