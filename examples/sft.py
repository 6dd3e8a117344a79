"""Teach SmolLM2 a task that it fails: the subject of an exam question, as JSON of one form.

    python examples/sft.py DATA --out sft.json

DATA holds ``eval/mmlu/{dev,val}/*.csv`` (questions of 57 exams, as the benchmark publishes them) and
``finetune/alpaca_en_demo.json`` (instructions). Trained on: 800 questions, the short instructions. Held out: 200 other
questions, whose answers have to be exact, and a tenth of the rows, whose loss is measured. Base, LoRA, QLoRA (over the
model in 4 bits) and full fine-tuning side by side.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from puna import LLM
from puna.checkpoint.convert import convert
from puna.store import Store, resolve
from puna.train.finetune import prepare, run
from puna.train.recipe import recipe_from

EXAMS = {
    "biology": "college_biology high_school_biology",
    "business": "business_ethics management marketing professional_accounting public_relations",
    "chemistry": "college_chemistry high_school_chemistry",
    "computing": "college_computer_science computer_security high_school_computer_science machine_learning",
    "economics": "econometrics high_school_macroeconomics high_school_microeconomics",
    "history": "high_school_european_history high_school_us_history high_school_world_history prehistory",
    "law": "international_law jurisprudence professional_law",
    "mathematics": "abstract_algebra college_mathematics elementary_mathematics high_school_mathematics "
    "high_school_statistics",
    "medicine": "anatomy clinical_knowledge college_medicine human_aging medical_genetics nutrition virology",
    "philosophy": "formal_logic logical_fallacies moral_disputes philosophy",
    "physics": "astronomy college_physics conceptual_physics electrical_engineering high_school_physics",
    "politics": "high_school_government_and_politics security_studies us_foreign_policy",
    "psychology": "high_school_psychology professional_psychology",
    "religion": "world_religions",
}
SUBJECTS = sorted(EXAMS)
SYSTEM = "Name the subject of the exam question, as JSON."
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"method": {"type": "lora"}},
    "QLoRA, base in Q4_0": {"method": {"type": "qlora", "base_type": "Q4_0"}},
    "full": {"method": {"type": "full"}},
}


def questions(data: Path) -> list[tuple[str, str]]:
    """(question, answer) of MMLU's questions of 5 to 40 words, in a fixed random order."""
    subject_of = {exam: subject for subject, exams in EXAMS.items() for exam in exams.split()}
    found = []
    for path in sorted((data / "eval" / "mmlu").glob("*/*.csv")):
        subject = subject_of.get(path.stem.rpartition("_")[0])
        if subject is not None:
            with path.open(encoding="utf-8", newline="") as file:
                found += [(row[0], json.dumps({"subject": subject})) for row in csv.reader(file)]
    found = sorted({pair for pair in found if 5 <= len(pair[0].split()) <= 40})
    random.Random(0).shuffle(found)
    return found


def write_rows(path: Path, data: Path, learnt: list[tuple[str, str]]) -> None:
    rows = [{"messages": [*prompt(q), {"role": "assistant", "content": answer}]} for q, answer in learnt]
    for row in json.loads((data / "finetune" / "alpaca_en_demo.json").read_text(encoding="utf-8")):
        if len(" ".join(row.values()).split()) <= 60:
            user = {"role": "user", "content": f"{row['instruction']}\n{row['input']}".strip()}
            rows.append({"messages": [user, {"role": "assistant", "content": row["output"]}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prompt(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def exact(model: Any, asked: list[tuple[str, str]], *, constrained: bool = False) -> float:
    """The share of exact answers, greedy; ``constrained`` to the JSON schema of the right form."""
    schema = {
        "type": "object",
        "properties": {"subject": {"enum": SUBJECTS}},
        "required": ["subject"],
        "additionalProperties": False,
    }
    with LLM.load(model) as llm:
        constraint = llm.constraints.json_schema(schema) if constrained else None
        right = 0
        for question, answer in asked:
            text = llm.chat(prompt(question), temperature=0, max_tokens=24, constraint=constraint).text
            right += json.loads(text) == json.loads(answer) if constrained else text.strip() == answer
    return right / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    asked = questions(given.data)
    held_out, learnt = asked[:200], asked[200:1000]
    with tempfile.TemporaryDirectory() as scratch:
        store, rows, base = Store(Path(scratch) / "store"), Path(scratch) / "rows.jsonl", Path(scratch) / "base.gguf"
        write_rows(rows, given.data, learnt)
        convert(resolve("smollm2").path, base, None, "F16")
        figures: list[dict[str, Any]] = [
            {"model": "base", "exact": exact(base, held_out)},
            {"model": "base, held to the schema", "exact": exact(base, held_out, constrained=True)},
        ]
        for name, method in METHODS.items():
            recipe = recipe_from(
                {
                    "model": str(base),
                    "dtype": "bfloat16",
                    "output": name.split(",")[0].lower(),
                    "data": [{"path": str(rows), "validation": 0.1}],
                    "training": {"steps": given.steps, "length": 512, "batch": 2},
                    **method,
                }
            )
            start = time.perf_counter()
            outcome = run(prepare(recipe, store), on_step=lambda report: print(f"\r{report.step}", end="", flush=True))
            seconds = time.perf_counter() - start
            share = exact(resolve(recipe.output, store), held_out)
            losses = {"loss_before": outcome.before, "loss_after": outcome.after}
            figures.append({"model": name, "exact": share, **losses, "seconds": seconds})
    print("\n| | exact answers of 200 | held-out loss before → after | minutes |\n|---|---|---|---|")
    for row in figures:
        losses, minutes = ("", "")
        if "seconds" in row:
            losses = f"{row['loss_before']:.3f} → {row['loss_after']:.3f}"
            minutes = f"{row['seconds'] / 60:.1f}"
        print(f"| {row['model']} | {100 * row['exact']:.1f} % | {losses} | {minutes} |")
    if given.out:
        given.out.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
