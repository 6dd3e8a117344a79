"""Distillation: a student of half SmolLM2's layers, taught by SmolLM2, beside the same student trained on text alone.

    python examples/distill.py DATA [--out distill.json]

DATA is the folder that holds finetune/c4_demo.jsonl. Both students begin with every second layer of the model, see the
same text in the same order, and take as many steps; the teacher is the quantized file as it is. Shown is the loss by
token on text that no one was trained on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from puna.checkpoint import Checkpoint, open_checkpoint
from puna.ops.torch_ops import TorchOps
from puna.store import resolve
from puna.train.data.dataset import Subset, open_dataset
from puna.train.data.for_model import renderer_for
from puna.train.data.order import Order
from puna.train.data.packing import PackedStream
from puna.train.module import Full, LlamaModule
from puna.train.objectives import Knobs, knobs_of
from puna.train.student import student_of
from puna.train.trainer import NextToken, Settings, StepReport, Trainer, evaluate

LENGTH, BATCH, HELD_OUT = 256, 2, 8
FROZEN = "embed_tokens"  # also the head of this model: it is the teacher's, and good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--out", type=Path, default=Path("distill.json"))
    options = parser.parse_args()

    renderer = renderer_for(options.model)
    dataset = open_dataset(options.data / "finetune" / "c4_demo.jsonl")
    to_train, held_out = (Subset(dataset, numbers) for numbers in dataset.checked().split(0.1))

    def stream(examples: Subset, seed: int, epochs: int | None) -> PackedStream:
        order = Order([len(examples)], seed=seed, epochs=epochs)
        bos = renderer.tokenizer.bos_id

        def render(source: int, number: int) -> Any:
            return renderer.documents(examples[number])

        return PackedStream(order, render, LENGTH, truncation="split", bos=bos)

    validation = [next(stream_of) for stream_of in [stream(held_out, 0, 1)] for _ in range(HELD_OUT)]
    teacher = open_checkpoint(resolve(options.model).path)
    student = student_of(teacher)
    layers = (teacher.config.num_hidden_layers, student.config.num_hidden_layers)
    print(f"a teacher of {layers[0]} layers, students of {layers[1]}; {options.steps} steps of {BATCH * LENGTH} tokens")

    def train(name: str, knobs: Knobs) -> tuple[float, float]:
        """The held-out loss afterwards, and the seconds it took."""
        built = module(student)
        started = time.perf_counter()

        def show(report: StepReport) -> None:
            if report.step % 10 == 0:
                seconds = time.perf_counter() - started
                print(f"  {name}: step {report.step}, loss {report.loss:.3f}, {seconds:.0f} s", flush=True)

        settings = Settings(options.steps, options.rate, warmup=options.steps // 10, accumulate=BATCH, save_every=10**6)
        with tempfile.TemporaryDirectory() as folder:
            Trainer(built, knobs.objective(built), stream(to_train, 1, None), settings, Path(folder)).run(show)
        return evaluate(built, NextToken(), validation), time.perf_counter() - started

    losses = {
        "teacher": evaluate(module(teacher), NextToken(), validation),
        "student before": evaluate(module(student), NextToken(), validation),
    }
    losses["text alone"], text_seconds = train("text alone", knobs_of("sft", {}))
    with tempfile.TemporaryDirectory() as cache:
        knobs = knobs_of("distill", {"teacher": options.model, "weight": 0.9, "cache": cache})
        losses["distilled"], distill_seconds = train("distilled", knobs)

    print(f"\n{'':16}held-out loss")
    for name, loss in losses.items():
        print(f"{name:16}{loss:.3f}")
    found = {"steps": options.steps, "tokens_per_step": BATCH * LENGTH, "layers": layers, "held_out_loss": losses}
    found["seconds"] = {"text alone": text_seconds, "distilled": distill_seconds}
    options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def module(checkpoint: Checkpoint) -> LlamaModule:
    return LlamaModule(TorchOps(torch.bfloat16), checkpoint.config, checkpoint.tensors, Full(frozen=FROZEN))


if __name__ == "__main__":
    main()
